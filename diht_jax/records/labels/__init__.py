"""Concept labels in files of their own, beside the shards that they belong to."""
