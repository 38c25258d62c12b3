"""The documentation as a site: links out of `docs/`, the page of the command line, and tutorials that run."""
