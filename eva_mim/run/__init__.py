"""One stage from its recipe to its files."""
