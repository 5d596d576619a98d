"""Readers of the source formats: tars, tables, folders, TFDS and our own shards."""
