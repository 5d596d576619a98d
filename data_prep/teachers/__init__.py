"""Frozen image models whose embeddings the concept heads are trained on."""
