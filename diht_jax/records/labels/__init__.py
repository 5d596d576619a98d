"""Shards of concept labels and CLIP embeddings, stored separately from the record shards."""
