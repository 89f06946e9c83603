"""One box loss a file."""
