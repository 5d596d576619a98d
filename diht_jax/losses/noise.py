"""How likely each pair of the batch is a right one, by its similarity: for data with wrong pairs.

Say that a share e of the pairs is wrong: their texts belong to other images. The similarity of such
a pair is that of any image with any text, of mean w and variance v over all N^2 combinations of the
batch. That of right pairs has another mean r, and is taken to spread as much. The mean over all
pairs, m = (1 - e) r + e w, then gives r = w + (m - w) / (1 - e), and Bayes' rule the probability
that a pair of similarity c is right:

    p(c) = sigmoid(log((1 - e) / e) + (r - w) / v (c - (r + w) / 2))

A pair's loss counts with p, as a constant, divided by the batch's mean of p: one step of EM for the
mixture of right and wrong pairs, whose E step is p and whose M step is the step of the optimiser.

The stage of the training is in w, v and r alone. Before anything is learnt, r is w, all p are
1 - e, and the loss is what it is without weights; p falls for low similarities as right pairs come
to stand out. It is the same for all temperatures and monotone in c. Nothing of size [b, N] is
needed: w = <x, t> with the means x and t of the embeddings, and with the deviations from them

    v = mean_i (x_i' t)^2 + mean_j (x t_j')^2 + mean_ij (x_i' t_j')^2

of which the last is mean_i x_i' C x_i' with the texts' covariance C [d, d].

Source: ours; mixtures for wrong labels as in arXiv 1904.11238, there of the losses.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from diht_jax.losses.dense import AxisName

# A share of more than a half would mean that a pair like the average one is wrong.
HIGHEST_SHARE = 0.5


def right_probabilities(
    image_emb: jax.Array, text_emb: jax.Array, noise_share: float, axis_name: AxisName
) -> jax.Array:
    """p of the local pairs, without gradient; the same on any mesh.

    Args:
        image_emb, text_emb: float [b, d], L2-normalised, local.
        noise_share: e, in (0, `HIGHEST_SHARE`].
        axis_name: mesh axes that the batch is split over, or None.

    Returns:
        [b], at least float32.
    """
    dtype = jnp.promote_types(image_emb.dtype, jnp.float32)
    images, texts = (jax.lax.stop_gradient(x).astype(dtype) for x in (image_emb, text_emb))
    similarities = jnp.sum(images * texts, axis=1)
    image_mean, text_mean, mean = global_mean((images, texts, similarities), axis_name)
    images, texts = images - image_mean, texts - text_mean
    covariance = _matmul(texts.T, texts) / len(texts)
    if axis_name:
        covariance = jax.lax.pmean(covariance, axis_name)
    by_image = _matmul(images, text_mean) ** 2 + jnp.sum(_matmul(images, covariance) * images, 1)
    by_text = _matmul(_matmul(image_mean, covariance), image_mean)
    variance = global_mean(by_image, axis_name) + by_text
    wrong = jnp.sum(image_mean * text_mean)
    # While right pairs are not the more similar ones, similarities mean nothing.
    distance = jnp.maximum(mean - wrong, 0) / (1 - noise_share)
    slope = distance / jnp.maximum(variance, jnp.finfo(dtype).tiny)
    log_odds = math.log((1 - noise_share) / noise_share)
    return jax.nn.sigmoid(log_odds + slope * (similarities - wrong - distance / 2))


def global_mean(rows: Any, axis_name: AxisName) -> Any:
    """Of a tree of arrays [b, ...], over the rows of all devices."""
    means = jax.tree.map(lambda x: jnp.mean(x, axis=0), rows)
    return jax.lax.pmean(means, axis_name) if axis_name else means


def check_noise_share(value: float) -> None:
    """Raises ValueError for a share out of range."""
    if not 0 <= value <= HIGHEST_SHARE:
        raise ValueError(
            f"noise_share: expected a number in [0, {HIGHEST_SHARE}], 0 for no weights, got {value}"
        )


def _matmul(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision=jax.lax.Precision.HIGHEST)
