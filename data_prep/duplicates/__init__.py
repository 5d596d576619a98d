"""Near-duplicates of a data set: exact copies by content, and alike pictures by embeddings."""
