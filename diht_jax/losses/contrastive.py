"""The losses over pairs of the global batch: InfoNCE, HN-NCE and the sigmoid loss.

For custom training loops: pure functions of embeddings, without parameters, mesh or metrics. The
formulas are in `softmax.py` and `sigmoid.py`, the two ways to compute them in `streaming.py` and
`dense.py`.

How gradients come out, for a loss taken inside `jax.shard_map` over `axis_name`:

  * differentiated from outside of `shard_map` (a jitted step on global arrays): exact, for every
    argument, with `check_vma` and without.
  * `jax.grad` inside `shard_map(check_vma=True)`, the default: exact. Each device holds the
    gradient of its own rows; the gradient of a replicated value (`logit_scale`, parameters) is
    already summed over devices. Reduce nothing.
  * `jax.grad` inside `shard_map(check_vma=False)`: JAX then transposes the sum over devices to
    another sum, so each device holds its contribution times the number of devices. Average the
    gradients of replicated values with `jax.lax.pmean`, as in classic data parallelism (the
    factor and the mean cancel), or divide those of local rows by the number of devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from diht_jax.losses.dense import AxisName, dense_loss
from diht_jax.losses.objective import (
    Objective,
    PairStatistics,
    Scalars,
    check_equal_pairs,
    check_scalar,
)
from diht_jax.losses.sigmoid import Sigmoid
from diht_jax.losses.softmax import Softmax, is_known_zero
from diht_jax.losses.streaming import streaming_loss

IMPLS = ("streaming", "gathered")


def contrastive_loss(
    image_emb: Float[Array, "b d"],
    text_emb: Float[Array, "b d"],
    logit_scale: Float[Array, ""] | float,
    *,
    alpha: jax.Array | float = 1.0,
    beta: jax.Array | float = 0.0,
    axis_name: AxisName = None,
    impl: str = "streaming",
    stop_weight_gradient: bool = False,
    pair_ids: Integer[Array, "b ..."] | None = None,
    equal_pairs: str = "mask",
    pair_weights: Float[Array, " b"] | None = None,
) -> Float[Array, ""]:
    """Hard-negative contrastive loss (HN-NCE), the mean of both directions over the global batch.

    With `s_ij = logit_scale * <image_i, text_j>` and global batch size N, image to text is

        L_i = -log e^{s_ii} / (alpha e^{s_ii} + sum_{j != i} w_ij e^{s_ij})
        w_ij = (N - 1) e^{beta s_ij} / sum_{k != i} e^{beta s_ik}

    and text to image is the same on the transpose (weights normalised over images). `alpha=1,
    beta=0` is InfoNCE. Gradients flow through the weights unless `stop_weight_gradient`. The
    module docstring says how gradients come out inside and outside of `shard_map`.

    Pairs with equal `pair_ids` are no negatives of one another: sums over j != i are then over the
    others alone, and N - 1 is their number. As positives (UniCL's form, arXiv 2204.03610),

        L_i = -mean_{p in P_i} log e^{s_ip} / (alpha sum_{q in P_i} e^{s_iq} + sum_j w_ij e^{s_ij})

    with P_i all pairs equal to i, i itself included. A row without negatives counts 0.

    Args:
        image_emb: L2-normalised; row i and row i of `text_emb` are a pair. Inside `shard_map`, the
            rows of this device.
        text_emb: L2-normalised, of the same dtype.
        logit_scale: after exp; the same on every device.
        alpha: weight of the positive in the denominator, in [0, 1].
        beta: concentration of the weights on hard negatives, >= 0. Values that are traced cannot
            be checked, and always take the general path.
        axis_name: mesh axes that the batch is split over (a name or a tuple, in the order of the
            batch's PartitionSpec); None when the arrays hold the whole batch.
        impl: "streaming": texts travel round the ring of devices, memory O(b d); over several axes,
            neighbours along the last one gather their images where these are small. "gathered":
            every device gathers all embeddings and holds two [b, N] blocks of logits. "auto":
            "streaming", since the devices are not known here; `contrastive_objective` chooses by
            its mesh.
        stop_weight_gradient: treat `w_ij` as constants. Ours.
        pair_ids: [b] or [b, k], which pairs are equal: those that agree in all k columns (a 64-bit
            hash of the text without x64: two of uint32).
        equal_pairs: what equal pairs are to one another: "mask", nothing; "positive"; or
            "negative", as without ids.
        pair_weights: factors of the losses of pairs, both directions, as constants; the mean is
            still taken over N. None: 1.

    Returns:
        Scalar, the same on every device: float32, or float64 for float64 embeddings.

    Raises:
        ValueError: wrong shapes, dtypes, alpha, beta, impl, ids or equal_pairs; a batch of one pair
            without negatives to weigh.

    Source: DiHT, arXiv 2301.02280, "Hard-negative contrastive loss"; computed by the identity of
    `softmax.Softmax` rather than as a ratio of exponentials.
    """
    check_equal_pairs(equal_pairs)
    equal_pairs = "negative" if pair_ids is None else equal_pairs
    objective, scalars = Softmax.create(alpha, beta, stop_weight_gradient, equal_pairs)
    check_embeddings(image_emb, text_emb)
    is_single = _num_pairs(image_emb, axis_name) == 1
    if is_single and (objective.weighted or is_known_zero(alpha)):
        raise ValueError(
            "a global batch of 1 pair has no negatives: expected at least 2 pairs, or beta=0 "
            f"with alpha > 0, got alpha={alpha}, beta={beta}"
        )
    return mean_loss(
        objective,
        scalars,
        image_emb,
        text_emb,
        logit_scale,
        axis_name=axis_name,
        impl=impl,
        pair_ids=pair_ids,
        row_weights=pair_weights,
    )[0]


def sigmoid_loss(
    image_emb: Float[Array, "b d"],
    text_emb: Float[Array, "b d"],
    logit_scale: Float[Array, ""] | float,
    logit_bias: jax.Array | float,
    *,
    axis_name: AxisName = None,
    impl: str = "streaming",
    pair_ids: Integer[Array, "b ..."] | None = None,
    equal_pairs: str = "mask",
) -> Float[Array, ""]:
    """SigLIP's loss: every image with every text is a yes-no question.

        -1/N sum_ij log sigmoid(z_ij (logit_scale <image_i, text_j> + logit_bias)),

    with z = 1 for pairs and -1 for the others; of equal pairs, all logits are left out ("mask") or
    have z = 1 ("positive").

    Args:
        image_emb, text_emb, logit_scale, axis_name, impl, pair_ids, equal_pairs: see
            `contrastive_loss`.
        logit_bias: scalar; SigLIP starts at -10, with a scale of 10.

    Returns:
        Scalar, the same on every device: float32, or float64 for float64 embeddings.

    Raises:
        ValueError: wrong shapes, dtypes, impl, ids or equal_pairs.

    Source: Zhai et al., arXiv 2303.15343.
    """
    check_equal_pairs(equal_pairs)
    equal_pairs = "negative" if pair_ids is None else equal_pairs
    objective, scalars = Sigmoid.create(logit_bias, equal_pairs)
    return mean_loss(
        objective,
        scalars,
        image_emb,
        text_emb,
        logit_scale,
        axis_name=axis_name,
        impl=impl,
        pair_ids=pair_ids,
    )[0]


def mean_loss(
    objective: Objective,
    scalars: Scalars,
    image_emb: Float[Array, "b d"],
    text_emb: Float[Array, "b d"],
    logit_scale: Float[Array, ""] | float,
    *,
    axis_name: AxisName = None,
    impl: str = "streaming",
    pair_ids: Integer[Array, "b ..."] | None = None,
    row_weights: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], PairStatistics]:
    """Any contrastive loss: the mean of its rows and columns over the global batch.

    Args:
        objective, scalars: of `Objective.create`.
        image_emb, text_emb, logit_scale, axis_name, impl, pair_ids: see `contrastive_loss`; ids
            are not read where the objective has equal pairs as negatives.
        row_weights: `pair_weights` of `contrastive_loss`.

    Returns:
        The loss, as `contrastive_loss` returns it, and statistics of the local rows.

    Raises:
        ValueError: wrong shapes, dtypes, impl or ids.
    """
    check_embeddings(image_emb, text_emb)
    check_scalar("logit_scale", logit_scale)
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"impl: expected one of auto, {', '.join(IMPLS)}, got {impl!r}")
    image_emb, text_emb = jnp.asarray(image_emb), jnp.asarray(text_emb)
    if row_weights is not None:
        row_weights = jnp.asarray(row_weights)
    if objective.equal_pairs == "negative":
        pair_ids = None
    else:
        pair_ids = _ids_as_columns(pair_ids, jnp.shape(image_emb)[0])
    num_pairs = _num_pairs(image_emb, axis_name)
    # A single pair has no negative to stream.
    is_dense = impl == "gathered" or num_pairs == 1
    total, statistics = (dense_loss if is_dense else streaming_loss)(
        image_emb,
        text_emb,
        logit_scale,
        scalars,
        objective=objective,
        axis_name=axis_name,
        pair_ids=pair_ids,
        row_weights=row_weights,
    )
    if axis_name:
        total = jax.lax.psum(total, axis_name)
    return total / (2 * num_pairs), statistics


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


def _ids_as_columns(pair_ids: jax.Array | None, num_rows: int) -> jax.Array:
    """[b] or [b, k] -> [b, k]; raises ValueError for anything but integers."""
    shape, dtype = (None, None) if pair_ids is None else (jnp.shape(pair_ids), pair_ids.dtype)
    is_right = dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    if pair_ids is None or shape is None or len(shape) not in (1, 2) or not is_right:
        raise ValueError(
            f"pair_ids: expected integer [{num_rows}] or [{num_rows}, k], got {dtype} {shape}"
        )
    if shape[0] != num_rows:
        raise ValueError(f"pair_ids: expected {num_rows} rows, as image_emb has, got {shape[0]}")
    return jnp.reshape(pair_ids, (num_rows, -1))


def _num_pairs(image_emb: jax.Array, axis_name: AxisName) -> int:
    num_devices = jax.lax.axis_size(axis_name) if axis_name else 1
    return num_devices * jnp.shape(image_emb)[0]
