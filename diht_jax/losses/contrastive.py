"""Contrastive losses over the pairs of the global batch: InfoNCE, HN-NCE, sigmoid, and others.

`contrastive_loss` and `sigmoid_loss` are pure functions of embeddings, for custom training loops.
`contrastive_objective` and `sharded_loss` take global arrays and a mesh, and also return metrics.
The formulas are in `softmax.py` and `sigmoid.py`, and their two implementations in `streaming.py`
and `dense.py`.
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
    """Computes the hard-negative contrastive loss (HN-NCE), the mean over pairs and directions.

    With `s_ij = logit_scale * <image_i, text_j>` and global batch size N, image to text is

        L_i = -log e^{s_ii} / (alpha e^{s_ii} + sum_{j != i} w_ij e^{s_ij})
        w_ij = (N - 1) e^{beta s_ij} / sum_{k != i} e^{beta s_ik}

    and text to image is the same on the transpose (weights normalised over images). `alpha=1,
    beta=0` is InfoNCE. Gradients flow through the weights unless `stop_weight_gradient`. For
    gradients inside and outside of `shard_map`, see docs/explained/library.md.

    Pairs with equal `pair_ids` are not negatives of one another. The sums over j != i then exclude
    them, and N - 1 is replaced by the number of remaining negatives. If equal pairs are positives,
    P_i are all pairs equal to i, including i itself (UniCL's form, arXiv 2204.03610):

        L_i = -mean_{p in P_i} log e^{s_ip} / (alpha sum_{q in P_i} e^{s_iq} + sum_j w_ij e^{s_ij})

    A row without negatives has a loss of 0.

    Args:
        image_emb: L2-normalised; row i is the partner of row i of `text_emb`. Inside `shard_map`,
            the rows of this device.
        text_emb: L2-normalised, of the same dtype.
        logit_scale: after exp; the same on every device.
        alpha: weight of the positive in the denominator, in [0, 1].
        beta: concentration of the weights on hard negatives, >= 0. Traced values of alpha and beta
            are not checked and always use the general formula.
        axis_name: mesh axes that the batch is split over (a name or a tuple, in the order of the
            batch's PartitionSpec); None if the arrays hold the whole batch.
        impl: "streaming" sends texts round the ring of devices, with memory O(b d); over several
            axes, neighbours along the last one gather their images if these are small. "gathered"
            gathers all embeddings on every device, with two [b, N] blocks of logits. "auto" is
            "streaming" here; only `contrastive_objective` can choose by the devices of its mesh.
        stop_weight_gradient: treat `w_ij` as constants. Ours.
        pair_ids: [b] or [b, k]; pairs are equal if all k columns are equal. Without x64, a 64-bit
            hash of the text needs two columns of uint32.
        equal_pairs: relation of equal pairs: "mask" (neither positives nor negatives), "positive",
            or "negative" (like without ids).
        pair_weights: constant factors of the losses of pairs in both directions; the mean is still
            over N. None is 1.

    Returns:
        Scalar, the same on every device: float32, or float64 for float64 embeddings.

    Raises:
        ValueError: wrong shapes, dtypes, alpha, beta, impl, ids or equal_pairs; a global batch of
            one pair with alpha = 0 or beta > 0.

    Source: DiHT, arXiv 2301.02280, "Hard-negative contrastive loss"; computed by the identity in
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
    """Computes SigLIP's loss: a binary classification of every image with every text.

        -1/N sum_ij log sigmoid(z_ij (logit_scale <image_i, text_j> + logit_bias)),

    with z = 1 for pairs and -1 otherwise. Logits of equal pairs are excluded ("mask") or have z = 1
    ("positive").

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
    """Computes `contrastive_loss` or `sigmoid_loss` of a global batch on a mesh, with metrics.

    If `logit_bias` is given, the loss is `sigmoid_loss` and alpha and beta are ignored. The other
    arguments, the results and the errors are those of `contrastive_loss` and `sharded_loss`.
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
    """Computes a contrastive loss of a global batch on a mesh, with metrics.

    Made for `jax.value_and_grad(..., has_aux=True)` inside a jitted step: the gradients of all
    array arguments are those of the full-batch loss and need no further reduction.

    Args:
        loss: class of the loss, such as those in `registry.LOSSES`.
        image_emb, text_emb, logit_scale: see `contrastive_loss`; global.
        learnt: a scalar for each name in `loss.parameters`.
        settings: a value for each key in `loss.settings`.
        mesh: the mesh of the step; arrays are replicated over axes outside of `axis_names`.
        axis_names: axes that the batch is split over; their sizes must divide N.
        impl: see `contrastive_loss`; for "auto" see `dense.choose_impl`.
        pair_ids, pair_weights: see `contrastive_loss`; global. Ids are required unless
            `equal_pairs` in `settings` is "negative".

    Returns:
        The loss (mean over the global batch, replicated), and metrics: float32 scalars without
        gradients, as means over the global batch.
        `loss`.
        `i2t_accuracy`, `t2i_accuracy`: top-1 retrieval accuracy among all N. A tie with t others
            counts 1/(1 + t), the probability of a fair draw; collapsed embeddings then score 1/N
            and not 1. Ours.
        `positive_similarity`: cosine similarity of a pair.
        `hardest_negative_similarity`: highest cosine with a negative, averaged over directions.
        `equal_pairs`: fraction of pairs that are equal to another pair of the batch; only with
            ids. The other metrics then do not count equal pairs as negatives.

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
    """Computes the loss of `Objective.create`'s objective, and statistics of the local rows.

    The other arguments, the loss and the errors are those of `contrastive_loss`; `row_weights` are
    its `pair_weights`. Ids are ignored if the objective treats equal pairs as negatives.
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
    # The streaming form needs at least one negative.
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
    """Raises ValueError unless both are floating-point [b, d] of the same shape and dtype."""
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
    """Raises ValueError for unknown axes, or if the devices along them do not divide the batch."""
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
    """Reshapes ids [b] or [b, k] to [b, k]; raises ValueError unless they are integers."""
    is_integer = pair_ids is not None and jnp.issubdtype(pair_ids.dtype, jnp.integer)
    if not is_integer or pair_ids.ndim not in (1, 2) or len(pair_ids) != num_rows:
        found = None if pair_ids is None else f"{pair_ids.dtype} {pair_ids.shape}"
        raise ValueError(f"pair_ids: expected integer [{num_rows}] or [{num_rows}, k], got {found}")
    return jnp.reshape(pair_ids, (num_rows, -1))


def _num_pairs(image_emb: jax.Array, axis_name: AxisName) -> int:
    num_devices = jax.lax.axis_size(axis_name) if axis_name else 1
    return num_devices * jnp.shape(image_emb)[0]
