"""Datasets by name or path to problems: explicit columns, and a count of all that is wrong."""
