"""How each file format of a manifest is read."""
