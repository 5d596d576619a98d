"""What training adds to the dual encoder: concept heads, a logit bias, and the sum of the losses.

Used by the training step and by whatever creates or restores a whole training state. These
parameters live beside those of the model, under `concept_heads` and `logit_bias`; inference never
sees them. What a loss is belongs in `diht_jax.losses`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jax.typing import DTypeLike

from diht_jax import sharding
from diht_jax.losses.concepts import concept_losses_in_chunks, mean_over_labelled
from diht_jax.losses.sharded import contrastive_objective
from diht_jax.models.zoo import Architecture

Metrics = dict[str, jax.Array]
Parameters = dict[str, Any]

HEADS, LOGIT_BIAS = "concept_heads", "logit_bias"
HEADS_PATTERN = f"^{HEADS}/"

# SigLIP's start (arXiv 2303.15343): all pairs are taken for negatives, softly.
_SIGMOID_SCALE, _SIGMOID_BIAS = 10.0, -10.0


@dataclasses.dataclass(frozen=True)
class ConceptKind:
    """One of the two heads, by the names of its things.

    Attributes:
        head: in the parameters.
        size: key of `config.concepts`.
        weight: key of `config.concepts`.
        ids, probs: in the batch.
        loss: in the metrics.
    """

    head: str
    size: str
    weight: str
    ids: str
    probs: str
    loss: str


CONCEPT_KINDS = (
    ConceptKind(
        "objects", "num_objects", "object_weight", "object_ids", "object_probs", "object_loss"
    ),
    ConceptKind(
        "attributes",
        "num_attributes",
        "attribute_weight",
        "attribute_ids",
        "attribute_probs",
        "attribute_loss",
    ),
)


def active_kinds(config: ml_collections.ConfigDict) -> tuple[ConceptKind, ...]:
    """The concept losses that count in this run.

    Args:
        config: the section `concepts`.

    Raises:
        ValueError: a weight, size or feature that is none.
    """
    for kind in CONCEPT_KINDS:
        if not 0 <= config[kind.weight] < math.inf:
            raise ValueError(
                f"config.concepts.{kind.weight}={config[kind.weight]}: expected at least 0"
            )
        if config[kind.size] < 1:
            raise ValueError(
                f"config.concepts.{kind.size}={config[kind.size]}: expected at least 1"
            )
    if config.feature not in ("pooled", "projected"):
        raise ValueError(
            f"config.concepts.feature='{config.feature}': expected 'pooled' (before the "
            "projection) or 'projected'"
        )
    return tuple(kind for kind in CONCEPT_KINDS if config[kind.weight] > 0)


def with_objective_parameters(
    init_params: Callable[[jax.Array], Parameters],
    config: ml_collections.ConfigDict,
    arch: Architecture,
) -> Callable[[jax.Array], Parameters]:
    """The function from a key to the model's parameters, made to add the objective's own.

    Args:
        init_params: draws the model's parameters.
        config: the whole training config.
        arch: sizes of the model.

    Raises:
        ValueError: wrong values in `config.concepts` or `config.loss`.
    """
    if config.loss.kind not in ("softmax", "sigmoid"):
        raise ValueError(
            f"config.loss.kind='{config.loss.kind}': expected 'softmax' (InfoNCE, HN-NCE) or "
            "'sigmoid' (SigLIP)"
        )
    kinds = active_kinds(config.concepts)
    width = arch.vision_width if config.concepts.feature == "pooled" else arch.embed_dim
    dtype = jnp.dtype(config.model.param_dtype)

    def init(key: jax.Array) -> Parameters:
        params = init_params(key)
        if kinds:
            # Zeros: the first predictions are uniform, whatever the features.
            params[HEADS] = {
                kind.head: _zero_head(width, config.concepts[kind.size], dtype) for kind in kinds
            }
        if config.loss.kind == "sigmoid":
            params["log_logit_scale"] = jnp.asarray(math.log(_SIGMOID_SCALE), jnp.float32)
            params[LOGIT_BIAS] = jnp.asarray(_SIGMOID_BIAS, jnp.float32)
        return params

    return init


def optimizer_config(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The section `optimizer`, with the multipliers of the concept heads where there are some."""
    section = config.optimizer.copy_and_resolve_references()
    if active_kinds(config.concepts):
        heads = (
            HEADS_PATTERN,
            config.concepts.learning_rate_multiplier,
            config.concepts.weight_decay_multiplier,
        )
        section.multipliers = (*section.multipliers, heads)
    return section


def concept_losses(
    params: Parameters,
    pooled: jax.Array,
    projected: jax.Array,
    examples: dict[str, jax.Array],
    config: ml_collections.ConfigDict,
) -> dict[str, jax.Array]:
    """The concept losses of this device's examples, one by one; 0 for unlabelled ones.

    Args:
        params: with whole `concept_heads`.
        pooled: [b, width], of the image tower before the projection.
        projected: [b, d], after it.
        examples: with `object_ids` int32 [b, k], `object_probs` float32 [b, k] and so on.
        config: the section `concepts`.

    Returns:
        float32 [b] by the name of the loss.
    """
    features = pooled if config.feature == "pooled" else projected
    return {
        kind.loss: concept_losses_in_chunks(
            features,
            params[HEADS][kind.head]["kernel"],
            params[HEADS][kind.head]["bias"],
            examples[kind.ids],
            examples[kind.probs],
            chunk_rows=config.chunk_rows,
        )[0]
        for kind in active_kinds(config)
    }


def total_loss(
    encoded: dict[str, jax.Array],
    params: Parameters,
    examples: dict[str, jax.Array],
    *,
    mesh: Mesh,
    config: ml_collections.ConfigDict,
) -> tuple[jax.Array, Metrics]:
    """The weighted sum of all losses of the global batch, and metrics.

    Args:
        encoded: `image_emb` and `text_emb` [N, d], and what `concept_losses` returns, [N].
        params: of this run, with `log_logit_scale` and, for the sigmoid loss, `logit_bias`.
        examples: the batch.
        mesh: axes `data` and `fsdp`.
        config: the whole training config.

    Returns:
        Scalar loss, and the metrics of `contrastive_objective`; with concepts `loss` is the sum,
        and its parts stand beside it.
    """
    loss, metrics = contrastive_objective(
        encoded["image_emb"],
        encoded["text_emb"],
        jnp.exp(params["log_logit_scale"]),
        params.get(LOGIT_BIAS),
        mesh=mesh,
        axis_names=sharding.BATCH_AXES,
        alpha=config.loss.alpha,
        beta=config.loss.beta,
        impl=config.loss.impl,
        stop_weight_gradient=config.loss.stop_weight_gradient,
    )
    kinds = active_kinds(config.concepts)
    if not kinds:
        return loss, metrics
    metrics["contrastive_loss"] = metrics["loss"]
    for kind in kinds:
        is_labelled = jnp.sum(examples[kind.probs], axis=1) > 0
        part = mean_over_labelled(encoded[kind.loss], is_labelled)
        metrics[kind.loss] = jax.lax.stop_gradient(part)
        loss += config.concepts[kind.weight] * part
    return loss, {**metrics, "loss": jax.lax.stop_gradient(loss)}


def _zero_head(width: int, size: int, dtype: DTypeLike) -> dict[str, jax.Array]:
    return {"kernel": jnp.zeros((width, size), dtype), "bias": jnp.zeros(size, dtype)}
