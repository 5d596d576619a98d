"""Files, local and in object stores: open, write, copy, lock and retry."""
