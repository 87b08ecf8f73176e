"""Results to tables, figures, a page and text."""
