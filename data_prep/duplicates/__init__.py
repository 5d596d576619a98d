"""Near-duplicates in a data set: exact copies by content, similar images by embeddings."""
