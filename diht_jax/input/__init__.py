"""The training input: the order of examples, decoding, and the processes that do it."""
