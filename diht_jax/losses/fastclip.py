"""FastCLIP's loss: every record keeps the mean over its negatives, so that small batches suffice.

With s_ij = logit_scale * <image_i, text_j> and temperature tau = 1 / logit_scale, the mean over the
negatives of a batch of N pairs and its running mean are, for the images and likewise for the texts,

    g_i = 1/(N-1) sum_{j != i} e^{s_ij - s_ii}      u_i <- (1 - gamma) u_i + gamma g_i

    L = tau (rho + mean_i log(epsilon + u_i))       dL/ds_ij by tau/(epsilon + u_i) dg_i/ds_ij

the mean being over records and both directions. The gradient is not that of L, which counts u_i as
if it depended on this batch alone: it is an estimate of that of the same loss with all records as
negatives, whose error does not depend on N alone. The means are kept as logarithms, so that no
power overflows. A record that has not come before starts with its g_i.

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

# Of the records: their means for images and for texts, as logarithms.
Means = dict[str, Float[Array, " records"]]
_IMAGE, _TEXT = "log_image_mean", "log_text_mean"
# The number of records is rounded up to it, so that any usual number of devices divides it.
_MULTIPLE = 1024


@dataclasses.dataclass(frozen=True)
class FastClip(Objective):
    """FastCLIP; its settings are checked here, and `fastclip_loss` computes it."""

    keeps_means: ClassVar[bool] = True
    settings: ClassVar[dict[str, Any]] = {
        # Weight of a batch in the running mean of a record ("fastclip"): from 1 in the first epoch
        # down along half a cosine, by epochs, to this.
        "gamma": Key(0.2, SHARE_NOT_0),
        "gamma_epochs": Key(16.0, POSITIVE),  # until then; half of the run in the paper
        "rho": Key(6.5, NOT_NEGATIVE),  # what a high temperature costs ("fastclip")
        "epsilon": Key(1e-14, POSITIVE),  # added to the running means ("fastclip")
    }

    @classmethod
    def create(cls, **settings: float) -> tuple[FastClip, Scalars]:
        """See `Objective.create`; the ranges of the keys are all that there is to check."""
        return cls(), ()


def initial_means(num_records: int) -> Means:
    """The means before the first step: those of records that have not come yet."""
    size = -(-num_records // _MULTIPLE) * _MULTIPLE
    return {name: jnp.full(size, -jnp.inf, jnp.float32) for name in (_IMAGE, _TEXT)}


def gamma_at(
    step: ArrayLike, *, gamma: float, gamma_epochs: float, batch_size: int, num_records: int
) -> Float[Array, ""]:
    """Weight of a batch after `step` updates; the same in all steps of an epoch."""
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
    """The loss of a global batch on a mesh, metrics, and the means after it.

    Every device gathers all embeddings. Of a record that a batch holds twice the larger mean stays.

    Args:
        image_emb, text_emb: L2-normalised, global, split over `axis_names`.
        logit_scale: after exp.
        means: of `initial_means`, or of the step before.
        record_ids: numbers of the records of the batch.
        gamma: in (0, 1], of `gamma_at`.
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
        estimate = _mean(slope * (log_g - fixed), axis_names)  # 0, with the gradient
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
    """Logarithms of g."""
    positives = jnp.sum(logits, axis=1, where=is_positive)
    negatives = jnp.where(is_positive, -jnp.inf, logits)
    return jax.nn.logsumexp(negatives, axis=1) - positives - math.log(logits.shape[1] - 1)


def _replace(values: jax.Array, ids: jax.Array, new: jax.Array) -> jax.Array:
    """Sets values by id; of several for one id the largest, where `set` alone would leave any."""
    return values.at[ids].set(-jnp.inf).at[ids].max(new.astype(values.dtype))


def _mean(values: Float[Array, "2 b"], axis_names: tuple[str, ...]) -> Float[Array, ""]:
    return jax.lax.pmean(jnp.mean(values), axis_names)
