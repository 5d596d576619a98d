"""Units of work for the input of a command."""
