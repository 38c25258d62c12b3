"""What TRL imports from here."""
