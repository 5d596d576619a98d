"""InfoNCE and the hard-negative contrastive loss (HN-NCE) over the global batch.

Called by `diht_jax.losses.total` and by users with embeddings of their own. Everything here is a
pure function of embeddings: no parameters, no mesh, no metrics.

How gradients come out, for a loss taken inside `jax.shard_map` over `axis_name`:

  * differentiated from outside of `shard_map` (a jitted step on global arrays): exact, for every
    argument, whatever `check_vma` is.
  * `jax.grad` inside `shard_map(check_vma=True)`, the default: exact. Each device holds the
    gradient of its own rows; the gradient of a replicated value (`logit_scale`, parameters) is
    already summed over devices. Reduce nothing.
  * `jax.grad` inside `shard_map(check_vma=False)`: JAX then transposes the sum over devices to
    another sum, so each device holds its contribution times the number of devices. Average the
    gradients of replicated values with `jax.lax.pmean`, as in classic data parallelism (the
    factor and the mean cancel), or divide those of local rows by the number of devices.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...] | None

IMPLS = ("dense",)


def contrastive_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array | float,
    *,
    alpha: jax.Array | float = 1.0,
    beta: jax.Array | float = 0.0,
    axis_name: AxisName = None,
    impl: str = "dense",
    stop_weight_gradient: bool = False,
) -> jax.Array:
    """Hard-negative contrastive loss (HN-NCE), the mean of both directions over the global batch.

    With `s_ij = logit_scale * <image_i, text_j>` and global batch size N, image to text is

        L_i = -log e^{s_ii} / (alpha e^{s_ii} + sum_{j != i} w_ij e^{s_ij})
        w_ij = (N - 1) e^{beta s_ij} / sum_{k != i} e^{beta s_ik}

    and text to image is the same on the transpose (weights normalised over images). `alpha=1,
    beta=0` is InfoNCE. Gradients flow through the weights unless told otherwise. The module
    docstring says how gradients come out inside and outside of `shard_map`.

    Args:
        image_emb: float [b, d], L2-normalised; row i and row i of `text_emb` are a pair. Inside
            `shard_map`, this device's rows.
        text_emb: float [b, d], L2-normalised, same shape and dtype.
        logit_scale: scalar, after exp; the same on every device.
        alpha: weight of the positive in the denominator, in [0, 1].
        beta: concentration of the weights on hard negatives, >= 0. Values that are traced cannot
            be checked, and always take the general path.
        axis_name: mesh axes that the batch is split over (a name or a tuple, in the order of the
            batch's PartitionSpec); None when the arrays hold the whole batch.
        impl: "dense": every device gathers all embeddings and holds two [b, N] blocks of logits.
        stop_weight_gradient: treat `w_ij` as constants. Ours.

    Returns:
        Scalar, the same on every device: float32, or float64 for float64 embeddings.

    Raises:
        ValueError: wrong shapes, dtypes, alpha, beta or impl; a batch of one pair without
            negatives to weigh.

    Source: DiHT, arXiv 2301.02280, "Hard-negative contrastive loss"; computed by the identity of
    `_loss_of_rows` rather than as a ratio of exponentials.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(IMPLS)}, got {impl!r}")
    check_embeddings(image_emb, text_emb)
    _check_weighting(logit_scale, alpha, beta)
    i2t, t2i, is_positive = similarity_blocks(image_emb, text_emb, axis_name)
    num_pairs = i2t.shape[1]
    if num_pairs == 1 and not (_is_known_zero(beta) and not _is_known_zero(alpha)):
        raise ValueError(
            "a global batch of 1 pair has no negatives: expected at least 2 pairs, or beta=0 "
            f"with alpha > 0, got alpha={alpha}, beta={beta}"
        )
    scale = jnp.asarray(logit_scale, i2t.dtype)
    row_losses = [
        _loss_of_rows(scale * block, is_positive, alpha, beta, stop_weight_gradient)
        for block in (i2t, t2i)
    ]
    total = jnp.sum(row_losses[0]) + jnp.sum(row_losses[1])
    return _sum_over_devices(total, axis_name) / (2 * num_pairs)


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
    return _inner_products(image_emb, all_texts), _inner_products(text_emb, all_images), is_positive


def check_embeddings(image_emb: jax.Array, text_emb: jax.Array) -> None:
    """Raises ValueError unless both are floating-point [b, d] of one shape and dtype."""
    image_shape, text_shape = jnp.shape(image_emb), jnp.shape(text_emb)
    if len(image_shape) != 2 or image_shape != text_shape or 0 in image_shape:
        raise ValueError(
            "image_emb and text_emb: expected the same shape [b, d] with b, d > 0, got "
            f"{image_shape} and {text_shape}"
        )
    dtypes = [jnp.result_type(emb) for emb in (image_emb, text_emb)]
    if dtypes[0] != dtypes[1] or not jnp.issubdtype(dtypes[0], jnp.floating):
        raise ValueError(
            "image_emb and text_emb: expected the same floating-point dtype, got "
            f"{dtypes[0]} and {dtypes[1]}; cast them before the loss"
        )


def _loss_of_rows(
    logits: jax.Array,
    is_positive: jax.Array,
    alpha: jax.Array | float,
    beta: jax.Array | float,
    stop_weight_gradient: bool,
) -> jax.Array:
    """One direction of the loss for each row of logits [b, N] -> [b].

    Uses, with LSE the log-sum-exp over the negatives of row i,

        L_i = logaddexp(log alpha, log(N-1) + LSE((1+beta) s_ij) - LSE(beta s_ij) - s_ii)

    which needs no exponential of a logit: nothing overflows, nothing underflows to 0/0, and a
    loss near zero keeps its digits because s_ii is taken off before the logaddexp.
    """
    positives = jnp.sum(logits, axis=1, where=is_positive)
    log_alpha = jnp.log(jnp.asarray(alpha, logits.dtype))
    if logits.shape[1] == 1:
        return log_alpha + jnp.zeros_like(positives)
    if _is_known_zero(beta):
        negatives = jax.nn.logsumexp(logits, axis=1, where=~is_positive)
    else:
        tilt = jnp.asarray(beta, logits.dtype) * logits
        if stop_weight_gradient:
            tilt = jax.lax.stop_gradient(tilt)
        negatives = (
            math.log(logits.shape[1] - 1)
            + jax.nn.logsumexp(logits + tilt, axis=1, where=~is_positive)
            - jax.nn.logsumexp(tilt, axis=1, where=~is_positive)
        )
    return jnp.logaddexp(log_alpha, negatives - positives)


def _inner_products(rows: jax.Array, columns: jax.Array) -> jax.Array:
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


def _sum_over_devices(value: jax.Array, axis_name: AxisName) -> jax.Array:
    return jax.lax.psum(value, axis_name) if axis_name else value


def _check_weighting(logit_scale: Any, alpha: Any, beta: Any) -> None:
    for name, value in (("logit_scale", logit_scale), ("alpha", alpha), ("beta", beta)):
        if jnp.shape(value) != ():
            raise ValueError(f"{name}: expected a scalar, got shape {jnp.shape(value)}")
    if not isinstance(alpha, jax.core.Tracer) and not 0 <= float(alpha) <= 1:
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha}")
    if not isinstance(beta, jax.core.Tracer) and not 0 <= float(beta) < math.inf:
        raise ValueError(f"beta: expected a finite number >= 0, got {beta}")


def _is_known_zero(value: jax.Array | float) -> bool:
    return not isinstance(value, jax.core.Tracer) and float(value) == 0
