"""Matryoshka representations: the loss of the first numbers of the embeddings as well.

The first 64, 128, ... numbers of an embedding, made to unit length again, count as an embedding of
their own, so that embeddings can be cut afterwards (`load_model(RUN, dim=128)`). All sizes together
cost at most as much as their sum is longer than the whole embeddings.

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
    """The weighted sum of a loss over sizes of the embeddings.

    Args:
        loss: from embeddings of images and texts to a scalar and metrics, `loss` among them.
        image_emb, text_emb: L2-normalised.
        sizes: numbers of an embedding -> weight; rising, and the last one is d.

    Returns:
        The sum, and the metrics of the whole embeddings, with `loss_64` and the like for each size.
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
    """The first numbers at unit length; the whole embeddings as they are."""
    return emb if size == emb.shape[1] else l2_normalize(emb[:, :size]).astype(emb.dtype)


def weighted_sizes(section: ml_collections.ConfigDict, embed_dim: int) -> dict[int, float]:
    """The sizes of the embeddings that have a loss, with its weight.

    Args:
        section: `matryoshka` of a config.
        embed_dim: size of the whole embeddings, whose weight is 1.

    Raises:
        ValueError: sizes that do not rise up to less than `embed_dim`, or not a weight for each.
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
