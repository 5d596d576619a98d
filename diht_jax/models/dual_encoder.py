"""The dual encoder: an image tower, a text tower and the logit scale.

Losses do not live here.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from diht_jax.models.text import TextTransformer
from diht_jax.models.transformer import Execution, Gather
from diht_jax.models.vit import VisionTransformer
from diht_jax.models.zoo import Architecture

INITIAL_LOG_LOGIT_SCALE = math.log(1 / 0.07)


class DualEncoder(nnx.Module):
    """CLIP's dual encoder, as DiHT has it (arXiv 2301.02280, official code)."""

    def __init__(
        self,
        arch: Architecture,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        execution: Execution | None = None,
        rngs: nnx.Rngs,
    ):
        """Builds both towers with CLIP's initialisation.

        Args:
            arch: sizes.
            dtype: of the computation. Softmax, LayerNorm statistics and embeddings are float32.
            param_dtype: of the stored parameters.
            execution: how to compute; layer by layer, nothing computed again, by default.
            rngs: needs the stream `params`.
        """
        common = {
            "execution": execution or Execution(),
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.vision = VisionTransformer(arch, **common)
        self.text = TextTransformer(arch, **common)
        self.log_logit_scale = nnx.Param(jnp.asarray(INITIAL_LOG_LOGIT_SCALE, jnp.float32))

    def encode_image(self, images: jax.Array) -> jax.Array:
        """Embeds normalised images, float [b, size, size, 3] -> float32 [b, d], L2-normalised."""
        return self.embed_features(self.vision.features(images))

    def embed_features(self, features: jax.Array) -> jax.Array:
        """Projects `vision.features`, [b, width] -> float32 [b, d], L2-normalised."""
        return l2_normalize(self.vision.projection(features))

    def encode_text(self, tokens: jax.Array, *, gather: Gather | None = None) -> jax.Array:
        """Embeds texts, int32 [b, t] -> float32 [b, d], L2-normalised."""
        return l2_normalize(self.text(tokens, gather=gather))


def l2_normalize(x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Divides rows by their lengths, in at least float32.

    Rows shorter than 1e-12 have no direction: they become 0, and so does their gradient, which is
    NaN where 0 is divided by the length of 0.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squared = jnp.sum(x * x, axis=-1, keepdims=True)
    has_length = squared > 1e-24
    # The inner choice keeps the derivative of the side that is not taken finite.
    return jnp.where(has_length, x * jax.lax.rsqrt(jnp.where(has_length, squared, 1)), 0)
