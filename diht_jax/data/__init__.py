"""Data: the record and its shards, readers of pairs, images, tokens and the input graph."""
