"""Concept labels: vocabularies, embeddings, heads trained on them, labelled shards."""
