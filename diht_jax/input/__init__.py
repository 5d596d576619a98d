"""The training input: order of examples, mixing of sources, decoding, and worker processes."""
