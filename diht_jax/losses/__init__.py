"""The training losses, as pure functions of embeddings.

No models, no optimisers and no input pipeline may come in here.
"""

from diht_jax.losses.concepts import concept_loss
from diht_jax.losses.contrastive import contrastive_loss, contrastive_objective, sigmoid_loss

__all__ = ["concept_loss", "contrastive_loss", "contrastive_objective", "sigmoid_loss"]
