"""Files, folders and datasets of the hub to rows: where they are read, by which columns, and in which format."""
