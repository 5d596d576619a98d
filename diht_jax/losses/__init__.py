"""Training losses, as pure functions of embeddings.

This package must not import models, optimisers or the input pipeline.
"""

from diht_jax.losses.concepts import concept_loss
from diht_jax.losses.contrastive import contrastive_loss, contrastive_objective, sigmoid_loss

__all__ = ["concept_loss", "contrastive_loss", "contrastive_objective", "sigmoid_loss"]
