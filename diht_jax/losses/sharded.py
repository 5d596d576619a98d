"""The training objective on global arrays, and what is measured beside it.

Called by the training step, which hands in embeddings of the global batch from inside `jax.jit`
and differentiates from outside. What a loss is belongs in a module of its own; here they are
placed on the mesh and measured.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from diht_jax.losses.contrastive import (
    check_embeddings,
    contrastive_loss_and_statistics,
    sigmoid_loss_and_statistics,
)
from diht_jax.losses.dense import AxisName
from diht_jax.losses.statistics import PairStatistics

Metrics = dict[str, jax.Array]


def contrastive_objective(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array | float,
    logit_bias: jax.Array | float | None = None,
    *,
    mesh: Mesh,
    axis_names: tuple[str, ...] = ("data", "fsdp"),
    alpha: float = 1.0,
    beta: float = 0.0,
    impl: str = "streaming",
    stop_weight_gradient: bool = False,
) -> tuple[jax.Array, Metrics]:
    """The contrastive loss of a global batch on a mesh, with metrics.

    Made for `jax.value_and_grad(..., has_aux=True)` inside a jitted step: the gradient with
    respect to all array arguments is that of the full-batch loss, with nothing left to reduce.

    Args:
        image_emb: float [N, d], L2-normalised, global; row i is the pair of row i of `text_emb`.
        text_emb: float [N, d], L2-normalised, global.
        logit_scale: scalar, after exp.
        logit_bias: scalar; given, the loss is `sigmoid_loss`, and alpha and beta say nothing.
        mesh: the mesh of the step; other axes than `axis_names` hold copies.
        axis_names: axes that the batch is split over; their sizes must divide N.
        alpha, beta, impl, stop_weight_gradient: see `contrastive_loss`.

    Returns:
        The loss (mean over the global batch, replicated), and a dict of float32 scalars that
        carry no gradient; means over the global batch:
        `loss`.
        `i2t_accuracy`, `t2i_accuracy`: share of queries whose own pair is the most similar of
            all N. Ours: a tie with t others counts 1/(1 + t), the chance of a fair draw, so
            that collapsed embeddings score 1/N and not 1.
        `positive_similarity`: cosine of a pair.
        `hardest_negative_similarity`: highest cosine with a wrong partner, over both directions.

    Raises:
        ValueError: wrong arguments, N < 2, or N not divisible by the devices.
    """
    check_embeddings(image_emb, text_emb)
    axis_names = (axis_names,) if isinstance(axis_names, str) else tuple(axis_names)
    missing = [name for name in axis_names if name not in mesh.shape]
    if missing or not axis_names:
        raise ValueError(
            f"axis_names: expected axes of the mesh {tuple(mesh.shape)}, got {axis_names}"
        )
    num_devices = math.prod(mesh.shape[name] for name in axis_names)
    num_pairs = image_emb.shape[0]
    if num_pairs % num_devices:
        raise ValueError(
            f"a global batch of {num_pairs} pairs cannot be split over the "
            f"{num_devices} devices of mesh axes {axis_names}; choose a multiple of {num_devices}"
        )
    if num_pairs < 2:
        raise ValueError("expected a global batch of at least 2 pairs, got 1")

    def local_objective(image_emb, text_emb, logit_scale, *logit_bias):
        if logit_bias:
            loss, statistics = sigmoid_loss_and_statistics(
                image_emb, text_emb, logit_scale, *logit_bias, axis_name=axis_names, impl=impl
            )
        else:
            loss, statistics = contrastive_loss_and_statistics(
                image_emb,
                text_emb,
                logit_scale,
                alpha=alpha,
                beta=beta,
                axis_name=axis_names,
                impl=impl,
                stop_weight_gradient=stop_weight_gradient,
            )
        return loss, {"loss": jax.lax.stop_gradient(loss), **_metrics(statistics, axis_names)}

    by_example = PartitionSpec(axis_names)
    whole = PartitionSpec()
    scalars = [jnp.asarray(value) for value in (logit_scale, logit_bias) if value is not None]
    return jax.shard_map(
        local_objective,
        mesh=mesh,
        in_specs=(by_example, by_example, *(whole for _ in scalars)),
        out_specs=whole,
    )(image_emb, text_emb, *scalars)


def _metrics(statistics: PairStatistics, axis_name: AxisName) -> Metrics:
    def mean(values: jax.Array) -> jax.Array:
        return jax.lax.pmean(jnp.mean(values.astype(jnp.float32)), axis_name)

    statistics = jax.lax.stop_gradient(statistics)
    positive = statistics.positive
    hardest = (statistics.image_hardest + statistics.text_hardest) / 2
    return {
        "i2t_accuracy": mean(
            _top1_credit(positive, statistics.image_hardest, statistics.image_ties)
        ),
        "t2i_accuracy": mean(_top1_credit(positive, statistics.text_hardest, statistics.text_ties)),
        "positive_similarity": mean(positive),
        "hardest_negative_similarity": mean(hardest),
    }


def _top1_credit(positive: jax.Array, hardest: jax.Array, ties: jax.Array) -> jax.Array:
    """[b]: 1 if the positive wins, 1/(1 + t) if it ties with t negatives, else 0."""
    return jnp.where(positive > hardest, 1, jnp.where(positive == hardest, 1 / (1 + ties), 0))
