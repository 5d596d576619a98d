"""Embeddings of a whole source: encoding, files of them, and search."""
