"""Matryoshka representations: adds the losses of prefixes of the embeddings.

The first 64, 128, ... dimensions of an embedding, normalised again, have their own loss, so that
embeddings can be truncated after training (`load_model(RUN, dim=128)`). The cost grows at most by
the ratio of the sum of all sizes to the full size.

Source: Kusupati et al., arXiv 2205.13147.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_collections
from jaxtyping import Array, Float

from diht_jax.models.dual_encoder import l2_normalize

Metrics = dict[str, jax.Array]
Loss = Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]]


def loss_of_sizes(
    loss: Loss,
    image_emb: Float[Array, "N d"],
    text_emb: Float[Array, "N d"],
    sizes: dict[int, float],
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the weighted sum of a loss over prefixes of the embeddings.

    Args:
        loss: maps embeddings of images and texts to a scalar and metrics, which include `loss`.
        image_emb, text_emb: L2-normalised.
        sizes: size of the prefix -> weight, in increasing order; the last size is d.

    Returns:
        The sum, and the metrics of the full embeddings with `loss_64` etc. for each size.
    """
    total: Any = 0.0
    parts: dict[str, Any] = {}
    metrics: Metrics = {}
    for size, weight in sizes.items():
        value, metrics = loss(first_numbers(image_emb, size), first_numbers(text_emb, size))
        total += weight * value
        parts[f"loss_{size}"] = metrics["loss"]
    return total, {**metrics, **parts, "loss": jax.lax.stop_gradient(total)}


def first_numbers(emb: Float[Array, "N d"], size: int) -> Float[Array, "N size"]:
    """Truncates embeddings and normalises them again; full ones are returned unchanged."""
    return emb if size == emb.shape[1] else l2_normalize(emb[:, :size]).astype(emb.dtype)


def weighted_sizes(section: ml_collections.ConfigDict, embed_dim: int) -> dict[int, float]:
    """Returns the sizes of the embeddings that have a loss, with their weights.

    Args:
        section: `matryoshka` of a config.
        embed_dim: size of the full embeddings, which have a weight of 1.

    Raises:
        ValueError: sizes are not increasing or not below `embed_dim`, or weights do not match them.
    """
    sizes, weights = tuple(section.sizes), tuple(section.weights)
    wrong = [size for size in sizes if type(size) is not int or not 1 <= size < embed_dim]
    if wrong or list(sizes) != sorted(set(sizes)):
        raise ValueError(
            f"config.matryoshka.sizes={sizes}: expected rising whole numbers from 1 to less than "
            f"the {embed_dim} numbers of an embedding"
        )
    weights = weights or (1.0,) * len(sizes)
    if len(weights) != len(sizes):
        raise ValueError(
            f"config.matryoshka.weights={weights}: expected a number for each of "
            f"config.matryoshka.sizes={sizes}, or ()"
        )
    return {**dict(zip(sizes, weights, strict=True)), embed_dim: 1.0}
