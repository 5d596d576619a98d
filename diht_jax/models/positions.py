"""Learned position embeddings at another image size, or for texts of another length.

For fine-tuning at a higher resolution, or on longer texts, than the model was trained with.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax.models.zoo import Architecture

# Of the text tower; Long-CLIP's choices.
_KEPT_POSITIONS = 20
_STRETCHING_FACTOR = 4


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


def stretch_positions(embedding: jax.Array, context_length: int) -> jax.Array:
    """The text tower's position embeddings for texts of another length.

    Long-CLIP's rule (arXiv 2403.15378, "Knowledge-Preserved Stretching"): most texts are shorter
    than 20 tokens, so the first 20 positions are well trained and stay; those behind them are
    stretched by a factor of 4, linearly, and the last steps go on beyond the last position. So 77
    positions become 248. For more than that the factor is larger, and the last one reaches as far.
    For less, those of 248 are cut, and for no more than there are, these are cut.

    Args:
        embedding: [t, width].
        context_length: of the new texts, in tokens.

    Returns:
        [context_length, width], same dtype.

    Raises:
        ValueError: there are too few positions to stretch them.
    """
    known = embedding.shape[0]
    if context_length <= known:
        return embedding[:context_length]
    if known < _KEPT_POSITIONS + 2:
        raise ValueError(
            f"position embeddings of {known} tokens cannot be stretched to {context_length}: the "
            f"first {_KEPT_POSITIONS} stay, and two behind them are needed"
        )
    factor = max(_STRETCHING_FACTOR, (context_length - _KEPT_POSITIONS) / (known - _KEPT_POSITIONS))
    source = _KEPT_POSITIONS + np.arange(context_length - _KEPT_POSITIONS) / factor
    before = np.minimum(source.astype(int), known - 2)
    share = jnp.asarray((source - before)[:, None], jnp.float32)
    table = embedding.astype(jnp.float32)
    stretched = (1 - share) * table[before] + share * table[before + 1]
    return jnp.concatenate([embedding[:_KEPT_POSITIONS], stretched.astype(embedding.dtype)])


def fit_positions(
    params: dict[str, Any], num_patches: int, context_length: int | None = None
) -> dict[str, Any]:
    """Model parameters with their positions for another size of images, or of texts.

    Args:
        params: nested dict of the model.
        num_patches: of the image tower; see `resize_positions`.
        context_length: of the text tower; see `stretch_positions`. None keeps what it has.
    """
    fitted = dict(params)
    for tower, fit, size in (
        ("vision", resize_positions, num_patches),
        ("text", stretch_positions, context_length),
    ):
        if size is not None:
            embedding = fit(params[tower]["positional_embedding"], size)
            fitted[tower] = {**params[tower], "positional_embedding": embedding}
    return fitted


def fit_model(
    params: dict[str, Any],
    arch: Architecture,
    *,
    image_size: int | None = None,
    context_length: int | None = None,
) -> tuple[dict[str, Any], Architecture]:
    """Parameters and sizes of a model for images or texts of another size; None keeps its own."""
    sizes = {"image_size": image_size, "context_length": context_length}
    fitted = dataclasses.replace(arch, **{k: v for k, v in sizes.items() if v is not None})
    if fitted == arch:
        return params, arch
    num_patches = (fitted.image_size // fitted.patch_size) ** 2
    return fit_positions(params, num_patches, fitted.context_length), fitted
