"""A contrastive loss of global arrays on the devices of a mesh, with its metrics.

Embeddings of the global batch come in from inside `jax.jit`, and are differentiated from outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Integer

from diht_jax.losses.choice import choose_impl
from diht_jax.losses.contrastive import check_embeddings, mean_loss
from diht_jax.losses.dense import AxisName
from diht_jax.losses.objective import Objective, PairStatistics
from diht_jax.losses.sigmoid import Sigmoid
from diht_jax.losses.softmax import Softmax

Metrics = dict[str, jax.Array]


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

    Args:
        image_emb, text_emb, logit_scale, mesh, axis_names, impl: see `sharded_loss`.
        logit_bias: scalar; given, the loss is `sigmoid_loss`, which has no alpha and beta.
        alpha, beta, stop_weight_gradient, equal_pairs: see `contrastive_loss`.
        pair_ids, pair_weights: global; see `contrastive_loss`.

    Returns:
        As `sharded_loss`.

    Raises:
        ValueError: wrong arguments, N < 2, or N not divisible by the devices.
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
        image_emb: L2-normalised, global; row i is the pair of row i of `text_emb`.
        text_emb: L2-normalised, global.
        logit_scale: after exp.
        learnt: a scalar for each name in `loss.parameters`.
        settings: a value for each key in `loss.settings`.
        mesh: the mesh of the step; other axes than `axis_names` hold copies.
        axis_names: axes that the batch is split over; their sizes must divide N.
        impl: see `contrastive_loss`; or "auto": see `choice.choose_impl`.
        pair_ids: global; needed where `settings` has another value of `equal_pairs` than
            "negative".
        pair_weights: global; see `contrastive_loss`.

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


def check_split(num_pairs: int, mesh: Mesh, axis_names: tuple[str, ...]) -> None:
    """Raises ValueError for axes that the mesh has not, or a batch that does not divide by them."""
    missing = [name for name in axis_names if name not in mesh.shape]
    if missing or not axis_names:
        raise ValueError(
            f"axis_names: expected axes of the mesh {tuple(mesh.shape)}, got {axis_names}"
        )
    num_devices = math.prod(mesh.shape[name] for name in axis_names)
    if num_pairs % num_devices:
        raise ValueError(
            f"a global batch of {num_pairs} pairs cannot be split over the "
            f"{num_devices} devices of mesh axes {axis_names}; choose a multiple of {num_devices}"
        )
    if num_pairs < 2:
        raise ValueError("expected a global batch of at least 2 pairs, got 1")


def pair_metrics(statistics: PairStatistics, axis_name: AxisName) -> Metrics:
    """The metrics of `sharded_loss`, of the statistics of the local rows."""

    def mean(values: jax.Array) -> jax.Array:
        return jax.lax.pmean(jnp.mean(values.astype(jnp.float32)), axis_name)

    statistics = jax.lax.stop_gradient(statistics)
    metrics: Metrics = {}
    if statistics.num_negatives is not None:
        num_others = jax.lax.axis_size(axis_name) * len(statistics.positive) - 1
        metrics["equal_pairs"] = mean(statistics.num_negatives < num_others)
        # Without any negative it is as dissimilar as can be, and not infinitely.
        statistics = statistics._replace(
            image_hardest=jnp.maximum(statistics.image_hardest, -1),
            text_hardest=jnp.maximum(statistics.text_hardest, -1),
        )
    positive = statistics.positive
    hardest = (statistics.image_hardest + statistics.text_hardest) / 2
    return {
        "i2t_accuracy": mean(
            _top1_credit(positive, statistics.image_hardest, statistics.image_ties)
        ),
        "t2i_accuracy": mean(_top1_credit(positive, statistics.text_hardest, statistics.text_ties)),
        "positive_similarity": mean(positive),
        "hardest_negative_similarity": mean(hardest),
        **metrics,
    }


def _top1_credit(positive: jax.Array, hardest: jax.Array, ties: jax.Array) -> jax.Array:
    """[b]: 1 if the positive wins, 1/(1 + t) if it ties with t negatives, else 0."""
    return jnp.where(positive > hardest, 1, jnp.where(positive == hardest, 1 / (1 + ties), 0))
