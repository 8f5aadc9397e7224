"""Reading and writing checkpoint files of any format."""
