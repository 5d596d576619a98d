"""The training objective on global arrays, and what is measured beside it.

Called by the training step, which hands in embeddings of the global batch from inside `jax.jit`
and differentiates from outside. What a loss is belongs in a module of its own; here they are
placed on the mesh and measured.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from diht_jax.losses.contrastive import (
    AxisName,
    check_embeddings,
    contrastive_loss,
    similarity_blocks,
)

Metrics = dict[str, jax.Array]


def contrastive_objective(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array | float,
    *,
    mesh: Mesh,
    axis_names: tuple[str, ...] = ("data", "fsdp"),
    alpha: float = 1.0,
    beta: float = 0.0,
    impl: str = "dense",
    stop_weight_gradient: bool = False,
) -> tuple[jax.Array, Metrics]:
    """The contrastive loss of a global batch on a mesh, with metrics.

    Made for `jax.value_and_grad(..., has_aux=True)` inside a jitted step: the gradient with
    respect to all three arrays is that of the full-batch loss, with nothing left to reduce.

    Args:
        image_emb: float [N, d], L2-normalised, global; row i is the pair of row i of `text_emb`.
        text_emb: float [N, d], L2-normalised, global.
        logit_scale: scalar, after exp.
        mesh: the mesh of the step; other axes than `axis_names` hold copies.
        axis_names: axes that the batch is split over; their sizes must divide N.
        alpha, beta, impl, stop_weight_gradient: see `contrastive_loss`.

    Returns:
        The loss (mean over the global batch, replicated), and `contrastive_metrics` together with
        `loss`, all float32 scalars that carry no gradient.

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
    if image_emb.shape[0] % num_devices:
        raise ValueError(
            f"a global batch of {image_emb.shape[0]} pairs cannot be split over the "
            f"{num_devices} devices of mesh axes {axis_names}; choose a multiple of {num_devices}"
        )

    def local_objective(image_emb, text_emb, logit_scale):
        loss = contrastive_loss(
            image_emb,
            text_emb,
            logit_scale,
            alpha=alpha,
            beta=beta,
            axis_name=axis_names,
            impl=impl,
            stop_weight_gradient=stop_weight_gradient,
        )
        metrics = contrastive_metrics(image_emb, text_emb, axis_name=axis_names)
        return loss, {"loss": jax.lax.stop_gradient(loss), **metrics}

    by_example = PartitionSpec(axis_names)
    whole = PartitionSpec()
    return jax.shard_map(
        local_objective, mesh=mesh, in_specs=(by_example, by_example, whole), out_specs=whole
    )(image_emb, text_emb, jnp.asarray(logit_scale))


def contrastive_metrics(
    image_emb: jax.Array, text_emb: jax.Array, *, axis_name: AxisName = None
) -> Metrics:
    """How well the pairs of the global batch find each other.

    Args:
        image_emb: float [b, d], L2-normalised; inside `shard_map`, this device's rows.
        text_emb: float [b, d], L2-normalised.
        axis_name: as for `contrastive_loss`.

    Returns:
        Means over the global batch, the same on every device, without gradient:
        `i2t_accuracy`, `t2i_accuracy`: share of queries whose own pair is the most similar of
            all N. Ours: a tie with t others counts 1/(1 + t), the chance of a fair draw, so
            that collapsed embeddings score 1/N and not 1.
        `positive_similarity`: cosine of a pair.
        `hardest_negative_similarity`: highest cosine with a wrong partner, over both directions.

    Raises:
        ValueError: wrong shapes, or a global batch of fewer than 2 pairs.
    """
    check_embeddings(image_emb, text_emb)
    image_emb, text_emb = jax.lax.stop_gradient((image_emb, text_emb))
    i2t, t2i, is_positive = similarity_blocks(image_emb, text_emb, axis_name)
    if i2t.shape[1] < 2:
        raise ValueError("contrastive metrics: expected a global batch of at least 2 pairs, got 1")
    mean = functools.partial(_global_mean, axis_name=axis_name)
    hardest = [jnp.max(block, axis=1, where=~is_positive, initial=-jnp.inf) for block in (i2t, t2i)]
    return {
        "i2t_accuracy": mean(_top1_credit(i2t, is_positive)),
        "t2i_accuracy": mean(_top1_credit(t2i, is_positive)),
        "positive_similarity": mean(jnp.sum(i2t, axis=1, where=is_positive)),
        "hardest_negative_similarity": mean((hardest[0] + hardest[1]) / 2),
    }


def _top1_credit(similarities: jax.Array, is_positive: jax.Array) -> jax.Array:
    """[b, N] -> [b]: 1 if the positive wins, 1/(1 + t) if it ties with t negatives, else 0."""
    positives = jnp.sum(similarities, axis=1, where=is_positive, keepdims=True)
    beaten = jnp.any(similarities > positives, axis=1)
    num_best = jnp.sum(similarities == positives, axis=1)
    return jnp.where(beaten, 0.0, 1.0 / num_best)


def _global_mean(values: jax.Array, axis_name: AxisName) -> jax.Array:
    mean = jnp.mean(values)
    return jax.lax.pmean(mean, axis_name) if axis_name else mean
