"""Weights of the pairs of a batch by how likely they are right: for data with wrong pairs.

Say that a fraction e of the pairs is wrong: their texts belong to other images. The similarity of
such a pair is that of any image with any text, of mean w and variance v over all N^2 combinations
of the batch. That of right pairs has another mean r, and is taken to spread as much. The mean over
all pairs, m = (1 - e) r + e w, then gives r = w + (m - w) / (1 - e), and Bayes' rule the
probability that a pair of similarity c is right:

    p(c) = sigmoid(log((1 - e) / e) + (r - w) / v (c - (r + w) / 2))

A pair's loss counts with p, as a constant, divided by the batch's mean of p: one step of EM for the
mixture of right and wrong pairs, whose E step is p and whose M step is the step of the optimiser.

Before anything is learnt, r is w, all p are 1 - e, and the loss is what it is without weights; p
falls for low similarities as right pairs come to stand out. Nothing of size [N, N] is needed:
w = <x, t> with the means x and t of the embeddings, and with the deviations from them

    v = mean_i (x_i' t)^2 + mean_j (x t_j')^2 + mean_ij (x_i' t_j')^2

of which the last is mean_i x_i' C x_i' with the texts' covariance C [d, d].

Source: ours; mixtures for wrong labels as in arXiv 1904.11238, there of the losses.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def right_probabilities(
    image_emb: Float[Array, "N d"], text_emb: Float[Array, "N d"], noise_share: float
) -> Float[Array, " N"]:
    """Probabilities p of the pairs of a global batch, without gradient, in at least float32.

    Divided by their mean they are `pair_weights` of `losses.contrastive_objective`.

    Args:
        image_emb, text_emb: L2-normalised, global.
        noise_share: e, above 0; above 0.5 a pair like the average one would be a wrong one.
    """
    dtype = jnp.promote_types(image_emb.dtype, jnp.float32)
    images, texts = (jax.lax.stop_gradient(x).astype(dtype) for x in (image_emb, text_emb))
    similarities = jnp.sum(images * texts, axis=1)
    image_mean, text_mean = jnp.mean(images, axis=0), jnp.mean(texts, axis=0)
    images, texts = images - image_mean, texts - text_mean
    covariance = _matmul(texts.T, texts) / len(texts)
    by_image = _matmul(images, text_mean) ** 2 + jnp.sum(_matmul(images, covariance) * images, 1)
    variance = jnp.mean(by_image) + _matmul(_matmul(image_mean, covariance), image_mean)
    wrong = jnp.sum(image_mean * text_mean)
    # While right pairs are not the more similar ones, similarities mean nothing.
    distance = jnp.maximum(jnp.mean(similarities) - wrong, 0) / (1 - noise_share)
    slope = distance / jnp.maximum(variance, jnp.finfo(dtype).tiny)
    log_odds = math.log((1 - noise_share) / noise_share)
    return jax.nn.sigmoid(log_odds + slope * (similarities - wrong - distance / 2))


def _matmul(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision=jax.lax.Precision.HIGHEST)
