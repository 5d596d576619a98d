"""The losses over pairs of the global batch: InfoNCE, HN-NCE, the sigmoid loss, and any other.

`contrastive_loss` and `sigmoid_loss` are for custom training loops: pure functions of embeddings.
`contrastive_objective` and `sharded_loss` take global arrays and a mesh, and add metrics. The
formulas are in `softmax.py` and `sigmoid.py`, the two ways to compute them in `streaming.py` and
`dense.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Integer

from diht_jax.losses.dense import choose_impl, dense_loss
from diht_jax.losses.objective import (
    AxisName,
    Objective,
    PairStatistics,
    Scalars,
    check_equal_pairs,
    check_scalar,
    pair_metrics,
)
from diht_jax.losses.sigmoid import Sigmoid
from diht_jax.losses.softmax import Softmax, is_known_zero
from diht_jax.losses.streaming import streaming_loss

IMPLS = ("streaming", "gathered")

Metrics = dict[str, jax.Array]


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
    beta=0` is InfoNCE. Gradients flow through the weights unless `stop_weight_gradient`.
    docs/explained/library.md says how gradients come out inside and outside of `shard_map`.

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


def contrastive_objective(
    image_emb: Float[Array, "N d"],
    text_emb: Float[Array, "N d"],
    logit_scale: Float[Array, ""] | float,
    logit_bias: jax.Array | float | None = None,
    *,
    mesh: Mesh,
    axis_names: str | tuple[str, ...] = ("data", "fsdp"),
    alpha: float = 1.0,
    beta: float = 0.0,
    impl: str = "streaming",
    stop_weight_gradient: bool = False,
    pair_ids: Integer[Array, "N ..."] | None = None,
    equal_pairs: str = "mask",
    pair_weights: Float[Array, " N"] | None = None,
) -> tuple[jax.Array, Metrics]:
    """`contrastive_loss` or `sigmoid_loss` of a global batch on a mesh, with metrics.

    With a `logit_bias` it is `sigmoid_loss`, which has no alpha and beta. The other arguments are
    those of `contrastive_loss`, global, and of `sharded_loss`, whose results and errors it has.
    """
    settings: dict[str, Any] = {"equal_pairs": "negative" if pair_ids is None else equal_pairs}
    if logit_bias is None:
        loss, learnt = Softmax, {}
        settings.update(alpha=alpha, beta=beta, stop_weight_gradient=stop_weight_gradient)
    else:
        loss, learnt = Sigmoid, {"logit_bias": logit_bias}
    return sharded_loss(
        loss,
        image_emb,
        text_emb,
        logit_scale,
        learnt,
        settings=settings,
        mesh=mesh,
        axis_names=axis_names,
        impl=impl,
        pair_ids=pair_ids,
        pair_weights=pair_weights,
    )


def sharded_loss(
    loss: type[Objective],
    image_emb: Float[Array, "N d"],
    text_emb: Float[Array, "N d"],
    logit_scale: Float[Array, ""] | float,
    learnt: Mapping[str, jax.Array | float],
    *,
    settings: Mapping[str, Any],
    mesh: Mesh,
    axis_names: str | tuple[str, ...] = ("data", "fsdp"),
    impl: str = "streaming",
    pair_ids: Integer[Array, "N ..."] | None = None,
    pair_weights: Float[Array, " N"] | None = None,
) -> tuple[jax.Array, Metrics]:
    """Any contrastive loss of a global batch on a mesh, with metrics.

    Made for `jax.value_and_grad(..., has_aux=True)` inside a jitted step: the gradient with
    respect to all array arguments is that of the full-batch loss, with nothing left to reduce.

    Args:
        loss: such as those of `registry.LOSSES`.
        image_emb, text_emb, logit_scale: see `contrastive_loss`; global.
        learnt: a scalar for each name in `loss.parameters`.
        settings: a value for each key in `loss.settings`.
        mesh: the mesh of the step; other axes than `axis_names` hold copies.
        axis_names: axes that the batch is split over; their sizes must divide N.
        impl: see `contrastive_loss`; or "auto": see `dense.choose_impl`.
        pair_ids, pair_weights: see `contrastive_loss`; global. Ids are needed where `settings` has
            another value of `equal_pairs` than "negative".

    Returns:
        The loss (mean over the global batch, replicated), and a dict of float32 scalars that carry
        no gradient; means over the global batch:
        `loss`.
        `i2t_accuracy`, `t2i_accuracy`: share of queries whose own pair is the most similar of
            all N. Ours: a tie with t others counts 1/(1 + t), the chance of a fair draw, so
            that collapsed embeddings score 1/N and not 1.
        `positive_similarity`: cosine of a pair.
        `hardest_negative_similarity`: highest cosine with a wrong partner, over both directions.
        `equal_pairs`: share of pairs that another pair of the batch is equal to; with ids alone.
            Equal pairs then are no wrong partners for the other metrics.

    Raises:
        ValueError: wrong arguments, N < 2, or N not divisible by the devices.
    """
    check_embeddings(image_emb, text_emb)
    axis_names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    check_split(image_emb.shape[0], mesh, axis_names)
    impl = choose_impl(mesh, axis_names, *image_emb.shape, impl).impl

    def on_device(image_emb, text_emb, pair_ids, pair_weights, logit_scale, learnt):
        objective, scalars = loss.create(**settings, **learnt)
        value, statistics = mean_loss(
            objective,
            scalars,
            image_emb,
            text_emb,
            logit_scale,
            axis_name=axis_names,
            impl=impl,
            pair_ids=pair_ids,
            row_weights=pair_weights,
        )
        return value, {"loss": jax.lax.stop_gradient(value), **pair_metrics(statistics, axis_names)}

    rows, whole = PartitionSpec(axis_names), PartitionSpec()
    replicated = jax.tree.map(jnp.asarray, (logit_scale, dict(learnt)))
    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(rows, rows, rows, rows, whole, whole), out_specs=whole
    )(image_emb, text_emb, pair_ids, pair_weights, *replicated)


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
    """Any contrastive loss, of `Objective.create`, and the statistics of the local rows.

    The other arguments, the loss and the errors are those of `contrastive_loss`; `row_weights` are
    its `pair_weights`. Ids are not read where the objective has equal pairs as negatives.
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
    dtype, text_dtype = jnp.result_type(image_emb), jnp.result_type(text_emb)
    if dtype != text_dtype or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            "image_emb and text_emb: expected the same floating-point dtype, got "
            f"{dtype} and {text_dtype}; cast them before the loss"
        )


def check_split(num_pairs: int, mesh: Mesh, axis_names: tuple[str, ...]) -> None:
    """Raises ValueError for axes that the mesh has not, or a batch that does not divide by them."""
    if not axis_names or set(axis_names) - set(mesh.shape):
        raise ValueError(
            f"axis_names: expected axes of the mesh {tuple(mesh.shape)}, got {axis_names}"
        )
    num_devices = math.prod(map(mesh.shape.get, axis_names))
    if num_pairs % num_devices:
        raise ValueError(
            f"a global batch of {num_pairs} pairs cannot be split over the "
            f"{num_devices} devices of mesh axes {axis_names}; choose a multiple of {num_devices}"
        )
    if num_pairs < 2:
        raise ValueError("expected a global batch of at least 2 pairs, got 1")


def _ids_as_columns(pair_ids: jax.Array | None, num_rows: int) -> jax.Array:
    """[b] or [b, k] -> [b, k]; raises ValueError for anything but integers."""
    is_integer = pair_ids is not None and jnp.issubdtype(pair_ids.dtype, jnp.integer)
    if not is_integer or pair_ids.ndim not in (1, 2) or len(pair_ids) != num_rows:
        found = None if pair_ids is None else f"{pair_ids.dtype} {pair_ids.shape}"
        raise ValueError(f"pair_ids: expected integer [{num_rows}] or [{num_rows}, k], got {found}")
    return jnp.reshape(pair_ids, (num_rows, -1))


def _num_pairs(image_emb: jax.Array, axis_name: AxisName) -> int:
    num_devices = jax.lax.axis_size(axis_name) if axis_name else 1
    return num_devices * jnp.shape(image_emb)[0]
