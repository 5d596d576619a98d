"""Weights of pairs by their probability of being correct, for data with mismatched pairs.

Assume that a fraction e of the pairs is mismatched: their texts belong to other images. Their
similarities are distributed like those of any image with any text, with mean w and variance v over
all N^2 combinations of the batch. Correct pairs have another mean r and, by assumption, the same
variance. The mean over all pairs, m = (1 - e) r + e w, then gives r = w + (m - w) / (1 - e). By
Bayes' rule, the probability that a pair of similarity c is correct is

    p(c) = sigmoid(log((1 - e) / e) + (r - w) / v (c - (r + w) / 2))

The loss of a pair is multiplied by p / mean(p), as a constant. This is one EM step for the mixture
of correct and mismatched pairs: p is the E step, and the optimiser's step the M step.

At the start of training r = w, all p are 1 - e, and the loss equals the unweighted one. As correct
pairs become more similar, p decreases for low similarities. No [N, N] array is needed:
w = <x, t> with the means x and t of the embeddings, and with the deviations from them

    v = mean_i (x_i' t)^2 + mean_j (x t_j')^2 + mean_ij (x_i' t_j')^2

where the last term is mean_i x_i' C x_i' with the texts' covariance C [d, d].

Source: ours; arXiv 1904.11238 has mixtures for wrong labels, fitted to losses.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def right_probabilities(
    image_emb: Float[Array, "N d"], text_emb: Float[Array, "N d"], noise_share: float
) -> Float[Array, " N"]:
    """Computes the probabilities p of a global batch, without gradients, in at least float32.

    Divided by their mean, they are the `pair_weights` of `losses.contrastive_objective`.

    Args:
        image_emb, text_emb: L2-normalised, global.
        noise_share: e, above 0; above 0.5, an average pair would be classified as mismatched.
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
    # Similarities are not informative unless correct pairs are more similar.
    distance = jnp.maximum(jnp.mean(similarities) - wrong, 0) / (1 - noise_share)
    slope = distance / jnp.maximum(variance, jnp.finfo(dtype).tiny)
    log_odds = math.log((1 - noise_share) / noise_share)
    return jax.nn.sigmoid(log_odds + slope * (similarities - wrong - distance / 2))


def _matmul(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision=jax.lax.Precision.HIGHEST)
