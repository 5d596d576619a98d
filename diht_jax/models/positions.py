"""Positions: learned ones for images of another size or texts of another length, and rotary ones.

The former are for fine-tuning at a higher resolution, or on longer texts, than the model was
trained with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax.models.zoo import Architecture

# Of the text tower; Long-CLIP's choices.
_KEPT_POSITIONS = 20
_STRETCHING_FACTOR = 4


class Rotary(NamedTuple):
    """Rotary positions of tokens: cosines and sines, float32 [t, d / 2] or [b, t, d / 2].

    Attributes:
        cos, sin: of the angle of each pair of numbers (0 and 1, 2 and 3, ...) of a head.
    """

    cos: jax.Array
    sin: jax.Array


def rotary_positions(side: int, reference_side: int, head_dim: int, *, class_token: bool) -> Rotary:
    """Rotary positions of a square grid of patches, as the Perception Encoder has them.

    One half of the pairs turns by the column, the other by the row, which count from 1. Those of a
    grid of another size are spread over the reference grid. A class token is not turned.

    Args:
        side: of the grid, in patches.
        reference_side: of the grid that the model was trained with.
        head_dim: width of a head, a multiple of 4.
        class_token: whether one comes before the patches.
    """
    num_bands = head_dim // 4
    bands = 10000.0 ** -(np.arange(num_bands) / num_bands)
    places = (np.arange(side) + 1) / side * reference_side
    rows, columns = np.meshgrid(places, places, indexing="ij")
    angles = np.concatenate([places.reshape(-1, 1) * bands for places in (columns, rows)], axis=1)
    angles = np.pad(angles, [(int(class_token), 0), (0, 0)])
    return Rotary(
        jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)
    )


def rotate(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Turns queries or keys [b, t, heads, d] by their positions, in at least float32."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    cos, sin = (table[..., :, None, :] for table in rotary)
    first, second = wide[..., 0::2], wide[..., 1::2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def resize_positions(
    embedding: jax.Array, num_patches: int, *, class_token: bool = True
) -> jax.Array:
    """Resizes the grid part of a ViT's position embeddings; the class token's stays.

    Bicubic with antialiasing on the square grid, as open_clip does when it loads a checkpoint
    into a model with another image size.

    Args:
        embedding: [1 + g * g, width], class token first.
        num_patches: of the new grid, a square number.
        class_token: False: there is none, and `embedding` is [g * g, width].

    Returns:
        [1 + num_patches, width], or [num_patches, width]; same dtype.

    Raises:
        ValueError: one of the two grids is not square.
    """
    old_patches = embedding.shape[0] - class_token
    old_side, new_side = math.isqrt(old_patches), math.isqrt(num_patches)
    if old_side**2 != old_patches or new_side**2 != num_patches:
        raise ValueError(
            f"position embeddings of {old_patches} patches cannot be resized to "
            f"{num_patches}: both must be square grids"
        )
    if old_side == new_side:
        return embedding
    width = embedding.shape[1]
    first = int(class_token)
    grid = embedding[first:].reshape(old_side, old_side, width).astype(jnp.float32)
    grid = jax.image.resize(grid, (new_side, new_side, width), method="cubic", antialias=True)
    grid = grid.reshape(num_patches, width).astype(embedding.dtype)
    return jnp.concatenate([embedding[:first], grid])


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
    has_class_token = "class_embedding" in params["vision"]
    for tower, fit, size in (
        ("vision", functools.partial(resize_positions, class_token=has_class_token), num_patches),
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
    return fit_positions(params, fitted.num_patches, fitted.context_length), fitted
