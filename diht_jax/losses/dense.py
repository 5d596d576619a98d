"""The dense forms of the losses: every device gathers all embeddings and holds [b, N] logits.

The readable reference that `streaming.py` is tested against, and the faster form for small
batches. Called by `contrastive.py`; gradients are JAX's own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from diht_jax.losses.objective import Objective, Sigmoid
from diht_jax.losses.statistics import PairStatistics

AxisName = str | tuple[str, ...] | None


def dense_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array,
    parameters: tuple[jax.Array, ...],
    *,
    objective: Objective,
    axis_name: AxisName,
) -> tuple[jax.Array, PairStatistics]:
    """The losses of the local rows in both directions, summed; see `streaming.streaming_loss`."""
    i2t, t2i, is_positive = similarity_blocks(image_emb, text_emb, axis_name)
    scale = jnp.asarray(logit_scale, i2t.dtype)
    total = sum(
        jnp.sum(_loss_of_rows(scale * block, is_positive, objective, parameters))
        for block in (i2t, t2i)
    )
    image_hardest, image_ties = _hardest(i2t, is_positive)
    text_hardest, text_ties = _hardest(t2i, is_positive)
    positive = jnp.sum(i2t, axis=1, where=is_positive)
    return total, PairStatistics(positive, image_hardest, image_ties, text_hardest, text_ties)


def similarity_blocks(
    image_emb: jax.Array, text_emb: jax.Array, axis_name: AxisName = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Similarities of the local rows with the global batch.

    Args:
        image_emb: float [b, d], local.
        text_emb: float [b, d], local.
        axis_name: as for `contrastive_loss`.

    Returns:
        image-to-text [b, N] and text-to-image [b, N], at least float32; and bool [b, N], true
        where the column is the row's own pair.
    """
    all_images, all_texts = image_emb, text_emb
    first_row = 0
    if axis_name:
        all_images = jax.lax.all_gather(image_emb, axis_name, tiled=True)
        all_texts = jax.lax.all_gather(text_emb, axis_name, tiled=True)
        first_row = jax.lax.axis_index(axis_name) * image_emb.shape[0]
    own_column = first_row + jnp.arange(image_emb.shape[0])
    is_positive = own_column[:, None] == jnp.arange(all_texts.shape[0])[None, :]
    return inner_products(image_emb, all_texts), inner_products(text_emb, all_images), is_positive


def inner_products(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`rows @ columns.T`, [b, d] x [N, d] -> [b, N], accumulated in at least float32.

    At scale 100 a product rounded to bfloat16 would be wrong by whole units of the logit, hence
    the highest precision (it costs nothing for bfloat16 inputs, whose products are exact).
    """
    return jax.lax.dot_general(
        rows,
        columns,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(rows.dtype, jnp.float32),
    )


def _loss_of_rows(
    logits: jax.Array,
    is_positive: jax.Array,
    objective: Objective,
    parameters: tuple[jax.Array, ...],
) -> jax.Array:
    """One direction of the loss for each row of logits [b, N] -> [b].

    For softmax uses, with LSE the log-sum-exp over the negatives of row i,

        L_i = logaddexp(log alpha, log(N-1) + LSE((1+beta) s_ij) - LSE(beta s_ij) - s_ii)

    which needs no exponential of a logit: nothing overflows, nothing underflows to 0/0, and a
    loss near zero keeps its digits because s_ii is taken off before the logaddexp.
    """
    if isinstance(objective, Sigmoid):
        (bias,) = parameters
        signs = jnp.where(is_positive, 1, -1).astype(logits.dtype)
        return -jnp.sum(jax.nn.log_sigmoid(signs * (logits + bias)), axis=1)
    alpha, beta = parameters
    positives = jnp.sum(logits, axis=1, where=is_positive)
    log_alpha = jnp.log(jnp.asarray(alpha, logits.dtype))
    if logits.shape[1] == 1:
        return log_alpha + jnp.zeros_like(positives)
    if not objective.weighted:
        negatives = jax.nn.logsumexp(logits, axis=1, where=~is_positive)
    else:
        tilt = jnp.asarray(beta, logits.dtype) * logits
        if objective.stop_weight_gradient:
            tilt = jax.lax.stop_gradient(tilt)
        negatives = (
            math.log(logits.shape[1] - 1)
            + jax.nn.logsumexp(logits + tilt, axis=1, where=~is_positive)
            - jax.nn.logsumexp(tilt, axis=1, where=~is_positive)
        )
    return jnp.logaddexp(log_alpha, negatives - positives)


def _hardest(block: jax.Array, is_positive: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[b, N] -> [b], [b]: the highest similarity with a wrong partner, and how many reach it."""
    block = jax.lax.stop_gradient(block)
    hardest = jnp.max(block, axis=1, where=~is_positive, initial=-jnp.inf)
    return hardest, jnp.sum(~is_positive & (block == hardest[:, None]), axis=1).astype(block.dtype)
