"""Learned position embeddings at another image size.

For fine-tuning at a higher resolution than the model was trained at.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp


def resize_positions(embedding: jax.Array, num_patches: int) -> jax.Array:
    """Resizes the grid part of a ViT's position embeddings; the class token's stays.

    Bicubic with antialiasing on the square grid, as open_clip does when it loads a checkpoint
    into a model with another image size.

    Args:
        embedding: [1 + g * g, width], class token first.
        num_patches: of the new grid, a square number.

    Returns:
        [1 + num_patches, width], same dtype.

    Raises:
        ValueError: one of the two grids is not square.
    """
    old_side, new_side = math.isqrt(embedding.shape[0] - 1), math.isqrt(num_patches)
    if old_side**2 != embedding.shape[0] - 1 or new_side**2 != num_patches:
        raise ValueError(
            f"position embeddings of {embedding.shape[0] - 1} patches cannot be resized to "
            f"{num_patches}: both must be square grids"
        )
    if old_side == new_side:
        return embedding
    width = embedding.shape[1]
    grid = embedding[1:].reshape(old_side, old_side, width).astype(jnp.float32)
    grid = jax.image.resize(grid, (new_side, new_side, width), method="cubic", antialias=True)
    grid = grid.reshape(num_patches, width).astype(embedding.dtype)
    return jnp.concatenate([embedding[:1], grid])


def fit_positions(params: dict[str, Any], num_patches: int) -> dict[str, Any]:
    """Model parameters with their image positions resized to `num_patches`."""
    vision = params["vision"]
    resized = resize_positions(vision["positional_embedding"], num_patches)
    return {**params, "vision": {**vision, "positional_embedding": resized}}
