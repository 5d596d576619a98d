"""From the input of a command to units of work."""
