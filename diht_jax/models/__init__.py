"""The dual encoder of DiHT in Flax NNX, and the named architectures."""

from diht_jax.models.dual_encoder import DualEncoder, l2_normalize
from diht_jax.models.zoo import Architecture, get_architecture

__all__ = ["Architecture", "DualEncoder", "get_architecture", "l2_normalize"]
