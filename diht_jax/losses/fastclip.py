"""FastCLIP's loss, which replaces large batches by a running mean over negatives for each record.

With s_ij = logit_scale * <image_i, text_j> and temperature tau = 1 / logit_scale, the mean over the
negatives of a batch of N pairs and its running mean are, for the images and likewise for the texts,

    g_i = 1/(N-1) sum_{j != i} e^{s_ij - s_ii}      u_i <- (1 - gamma) u_i + gamma g_i

    L = tau (rho + mean_i log(epsilon + u_i))       dL/ds_ij by tau/(epsilon + u_i) dg_i/ds_ij

The mean in L is over records and both directions. The gradient is not the derivative of L. It
estimates the gradient of the same loss with all records as negatives, and its error does not depend
on N alone. The means are stored as logarithms, to avoid overflow. The running mean of a record that
is seen for the first time starts with its g_i.

Source: Wei et al., FastCLIP (version 3), arXiv 2407.01445; Yuan et al., SogCLR, arXiv 2202.12387.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from diht_jax.config.keys import NOT_NEGATIVE, POSITIVE, SHARE_NOT_0, Key
from diht_jax.losses.contrastive import check_embeddings, check_split
from diht_jax.losses.dense import pair_statistics, similarity_blocks
from diht_jax.losses.objective import Objective, Scalars, pair_metrics

# Logarithms of the running means of all records, for images and for texts.
Means = dict[str, Float[Array, " records"]]
_IMAGE, _TEXT = "log_image_mean", "log_text_mean"
# The number of records is rounded up to a multiple of this, to divide by usual device counts.
_MULTIPLE = 1024


@dataclasses.dataclass(frozen=True)
class FastClip(Objective):
    """The settings of FastCLIP's loss, which `fastclip_loss` computes."""

    keeps_means: ClassVar[bool] = True
    settings: ClassVar[dict[str, Any]] = {
        # Final weight of a batch in the running mean of a record ("fastclip"). It decays from 1 in
        # the first epoch with a cosine schedule, constant within an epoch.
        "gamma": Key(0.2, SHARE_NOT_0),
        "gamma_epochs": Key(16.0, POSITIVE),  # of the decay of gamma; half of the run in the paper
        "rho": Key(6.5, NOT_NEGATIVE),  # penalty of a high temperature ("fastclip")
        "epsilon": Key(1e-14, POSITIVE),  # added to the running means ("fastclip")
    }

    @classmethod
    def create(cls, **settings: float) -> tuple[FastClip, Scalars]:
        """See `Objective.create`; the ranges of the keys are the only checks."""
        return cls(), ()


def initial_means(num_records: int) -> Means:
    """Returns the means before the first step, which mark all records as not seen."""
    size = -(-num_records // _MULTIPLE) * _MULTIPLE
    return {name: jnp.full(size, -jnp.inf, jnp.float32) for name in (_IMAGE, _TEXT)}


def gamma_at(
    step: ArrayLike, *, gamma: float, gamma_epochs: float, batch_size: int, num_records: int
) -> Float[Array, ""]:
    """Returns the weight of a batch after `step` updates; it is constant within an epoch."""
    epoch = jnp.floor(jnp.asarray(step, jnp.float32) * (batch_size / num_records))
    share = jnp.minimum(epoch / gamma_epochs, 1.0)
    return gamma + 0.5 * (1 + jnp.cos(math.pi * share)) * (1 - gamma)


def fastclip_loss(
    image_emb: Float[Array, "N d"],
    text_emb: Float[Array, "N d"],
    logit_scale: Float[Array, ""],
    means: Means,
    record_ids: Integer[Array, " N"],
    gamma: ArrayLike,
    *,
    rho: float,
    epsilon: float,
    mesh: Mesh,
    axis_names: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, jax.Array], Means]:
    """Computes FastCLIP's loss of a global batch on a mesh, metrics, and the updated means.

    Every device gathers all embeddings. If a record occurs twice in a batch, its larger mean wins.

    Args:
        image_emb, text_emb: L2-normalised, global, split over `axis_names`.
        logit_scale: after exp.
        means: from `initial_means` or the previous step.
        record_ids: indices of the batch's records in `means`.
        gamma: in (0, 1], from `gamma_at`.
        rho, epsilon, mesh, axis_names: see the formula, and `sharded_loss`.

    Raises:
        ValueError: wrong embeddings, N < 2, or N not divisible by the devices.
    """
    check_embeddings(image_emb, text_emb)
    check_split(image_emb.shape[0], mesh, axis_names)

    def on_device(image_emb, text_emb, before, logit_scale, gamma):
        *blocks, is_positive = similarity_blocks(image_emb, text_emb, axis_names)
        log_g = jnp.stack([_log_ratios(logit_scale * block, is_positive) for block in blocks])
        fixed = jax.lax.stop_gradient(log_g)
        mixed = jnp.logaddexp(jnp.log1p(-gamma) + before, jnp.log(gamma) + fixed)
        after = jnp.where(jnp.isneginf(before), fixed, mixed)
        log_norm = jnp.logaddexp(after, math.log(epsilon))
        tau = 1 / logit_scale
        value = tau * (rho + _mean(log_norm, axis_names))
        slope = jax.lax.stop_gradient(tau * jnp.exp(fixed - log_norm))
        estimate = _mean(slope * (log_g - fixed), axis_names)  # 0, but carries the gradient
        statistics = pair_statistics(blocks, is_positive, ~is_positive)
        return value + estimate, pair_metrics(statistics, axis_names), after

    rows, columns = PartitionSpec(axis_names), PartitionSpec(None, axis_names)
    whole = PartitionSpec()
    before = jnp.stack([means[name][record_ids] for name in (_IMAGE, _TEXT)])
    loss, metrics, after = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(rows, rows, columns, whole, whole),
        out_specs=(whole, whole, columns),
    )(image_emb, text_emb, jax.lax.stop_gradient(before), logit_scale, jnp.asarray(gamma))
    updated = {
        name: _replace(means[name], record_ids, new)
        for name, new in zip((_IMAGE, _TEXT), jax.lax.stop_gradient(after), strict=True)
    }
    return loss, {"loss": jax.lax.stop_gradient(loss), **metrics}, updated


def _log_ratios(logits: Float[Array, "b N"], is_positive: Bool[Array, "b N"]) -> Float[Array, " b"]:
    """Computes log g of every row."""
    positives = jnp.sum(logits, axis=1, where=is_positive)
    negatives = jnp.where(is_positive, -jnp.inf, logits)
    return jax.nn.logsumexp(negatives, axis=1) - positives - math.log(logits.shape[1] - 1)


def _replace(values: jax.Array, ids: jax.Array, new: jax.Array) -> jax.Array:
    """Sets values by id; a repeated id gets its largest value (with `set` alone any of them)."""
    return values.at[ids].set(-jnp.inf).at[ids].max(new.astype(values.dtype))


def _mean(values: Float[Array, "2 b"], axis_names: tuple[str, ...]) -> Float[Array, ""]:
    return jax.lax.pmean(jnp.mean(values), axis_names)
