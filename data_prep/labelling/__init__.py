"""Concept labels: vocabularies, teacher embeddings, linear heads, and labelled shards."""
