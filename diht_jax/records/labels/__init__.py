"""Concept labels and embeddings in shards of their own, next to the record shards."""
