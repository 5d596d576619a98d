"""Readers of the source formats: tars, tables, image folders, TFDS and record shards."""
