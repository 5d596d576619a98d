"""Frozen image models that provide the embeddings on which concept heads are trained."""
