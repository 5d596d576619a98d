"""The training objective: the config's contrastive loss plus additional terms.

Parameters that they learn are stored next to the model's (`logit_bias`, `concept_heads`);
inference does not use them. The losses are implemented in `diht_jax.losses` and in `terms`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Shaped

from diht_jax import sharding
from diht_jax.extras.matryoshka import loss_of_sizes, weighted_sizes
from diht_jax.extras.noisy_pairs import right_probabilities
from diht_jax.losses.contrastive import sharded_loss
from diht_jax.losses.fastclip import Means, fastclip_loss, gamma_at
from diht_jax.losses.objective import Parameters, Term
from diht_jax.losses.registry import LOSSES
from diht_jax.models.zoo import Architecture, get_architecture
from diht_jax.training.terms.registry import TERMS

Metrics = dict[str, Float[Array, ""]]
Kept = tuple[Means, Integer[Array, ""]] | None


def active_terms(config: ml_collections.ConfigDict) -> tuple[Term, ...]:
    """Returns the terms with a weight in this run; checks their settings."""
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    terms = []
    for name, kind in TERMS.items():
        term = kind(name, config[name], arch)
        if term.is_active:
            term.check()
            terms.append(term)
    return tuple(terms)


def bind_data(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Returns the config completed with facts about the data; see `Term.bind_data`."""
    for term in active_terms(config):
        config = term.bind_data(config)
    return config


def label_sizes(config: ml_collections.ConfigDict) -> tuple[int, int]:
    """Returns how many labels the terms read per record, and how wide; 0 for none.

    Returns:
        Number of the teacher's labels of each kind, and width of the CLIP teachers' embeddings.
    """
    num_labels = teacher_width = 0
    for term in active_terms(config):
        num_labels = max(num_labels, term.num_labels)
        teacher_width = max(teacher_width, term.teacher_width)
    return num_labels, teacher_width


def needs_pair_ids(config: ml_collections.ConfigDict) -> bool:
    """Returns whether the contrastive loss needs to know which pairs of a batch are equal.

    Raises:
        ValueError: `config.data.class_key` is set, but the loss does not use it.
    """
    loss = LOSSES[config.loss.kind]
    needed = "equal_pairs" in loss.settings and config.loss.equal_pairs != "negative"
    if config.data.class_key and not needed:
        raise ValueError(
            f"config.data.class_key={config.data.class_key!r} says which pairs are equal, but "
            f"config.loss.kind='{config.loss.kind}' with config.loss.equal_pairs="
            f"'{config.loss.equal_pairs}' does not ask; expected 'mask' or 'positive'"
        )
    return needed


def num_record_means(config: ml_collections.ConfigDict) -> int:
    """Returns the number of records for which the loss keeps a mean; 0 for other losses."""
    if not LOSSES[config.loss.kind].keeps_means:
        return 0
    equal_pairs = config.loss.equal_pairs
    for key, value in (
        ("loss.equal_pairs", None if equal_pairs == "negative" else equal_pairs),
        ("loss.noise_share", config.loss.noise_share),
        ("matryoshka.sizes", tuple(config.matryoshka.sizes)),
        ("data.class_key", config.data.class_key),
        ("data.allow_changed", config.data.allow_changed),
    ):
        if value:
            raise ValueError(
                f"config.{key}={value!r}: not with config.loss.kind='{config.loss.kind}', which "
                "keeps one mean of each record, over all others"
            )
    if config.loss.num_records is None:
        raise ValueError(
            f"config.loss.kind='{config.loss.kind}' keeps a mean of each record: set "
            "config.loss.num_records, which training finds in the data by itself"
        )
    return config.loss.num_records


def with_objective_parameters(
    init_params: Callable[[jax.Array], Parameters],
    config: ml_collections.ConfigDict,
    arch: Architecture,
) -> Callable[[jax.Array], Parameters]:
    """Wraps `init_params` to add the objective's own parameters to those of the model."""
    loss, terms, section = LOSSES[config.loss.kind], active_terms(config), config.loss
    try:
        loss.create(**{key: section[key] for key in loss.settings}, **loss.parameters)
    except ValueError as error:
        raise ValueError(f"config.loss.{error}") from error
    if config.matryoshka.sizes or config.matryoshka.weights:
        weighted_sizes(config.matryoshka, arch.embed_dim)  # checks the section
    if not terms and section.weight == 0:
        raise ValueError(
            "config.loss.weight=0: nothing is left to learn from; expected more than 0, or the "
            f"weight of a term above 0 ({', '.join(TERMS)})"
        )
    widths = {"pooled": arch.vision_width, "projected": arch.embed_dim}
    dtype = jnp.dtype(config.model.param_dtype)

    def init(key: jax.Array) -> Parameters:
        params = init_params(key)
        for term in terms:
            # The key depends on the name: other terms do not change the term's initial values.
            term_key = jax.random.fold_in(key, zlib.crc32(term.name.encode()))
            params.update(term.parameters(term_key, widths, dtype))
        if loss.initial_logit_scale is not None:
            log_scale = math.log(loss.initial_logit_scale)
            params["log_logit_scale"] = jnp.asarray(log_scale, jnp.float32)
        for name, start in loss.parameters.items():
            params[name] = jnp.asarray(start, jnp.float32)
        return params

    return init


def total_loss(
    encoded: dict[str, Float[Array, "N ..."]],
    params: Parameters,
    examples: dict[str, Shaped[Array, "N ..."]],
    *,
    terms: Sequence[Term],
    mesh: Mesh,
    config: ml_collections.ConfigDict,
    kept: Kept = None,
) -> tuple[Float[Array, ""], Metrics, Any]:
    """Computes the weighted sum of all losses of the global batch, metrics, and the loss's state.

    Args:
        encoded: `image_emb` and `text_emb` [N, d], and results of `Term.of_examples`, [N].
        params: parameters of this run, with `log_logit_scale` and those of losses and terms.
        kept: the loss's state per record, and the number of updates; None for a loss without
            state.

    Returns:
        Scalar loss; the metrics of `sharded_loss`; and the new state of the loss. With terms, or
        if the contrastive loss has another weight than 1, `loss` is the sum, and its parts are
        separate metrics.
    """
    total, metrics, means = _contrastive_loss(
        encoded, params, examples, mesh=mesh, config=config, kept=kept
    )
    weight = config.loss.weight
    if not terms and weight == 1:
        return total, metrics, means
    metrics["contrastive_loss"] = metrics["loss"]
    if weight != 1:
        # Multiplying by 0 would still compute the gradient of the loss.
        total = weight * total if weight else jnp.zeros_like(total)
    for term in terms:
        parts = term.of_batch(encoded, params, examples, mesh=mesh)
        for name, (weight, part) in parts.items():
            metrics[name] = jax.lax.stop_gradient(part)
            total += weight * part
    return total, {**metrics, "loss": jax.lax.stop_gradient(total)}, means


def _contrastive_loss(
    encoded: dict[str, jax.Array],
    params: Parameters,
    examples: dict[str, jax.Array],
    *,
    mesh: Mesh,
    config: ml_collections.ConfigDict,
    kept: Kept,
) -> tuple[jax.Array, Metrics, Means | None]:
    """Computes the contrastive loss of the global batch; see `total_loss`."""
    image_emb, text_emb = encoded["image_emb"], encoded["text_emb"]
    section = config.loss
    if kept is not None:
        means, step = kept
        gamma = gamma_at(
            step,
            gamma=section.gamma,
            gamma_epochs=section.gamma_epochs,
            batch_size=config.data.batch_size,
            num_records=section.num_records,
        )
        total, metrics, means = fastclip_loss(
            image_emb,
            text_emb,
            jnp.exp(params["log_logit_scale"]),
            means,
            examples["record_ids"],
            gamma,
            rho=section.rho,
            epsilon=section.epsilon,
            mesh=mesh,
            axis_names=sharding.BATCH_AXES,
        )
        return total, {**metrics, "gamma": gamma}, means
    loss, noise_share = LOSSES[section.kind], section.noise_share
    pair_weights, metrics = None, {}
    if noise_share:
        probabilities = right_probabilities(image_emb, text_emb, noise_share)
        pair_weights = probabilities / jnp.mean(probabilities)
        metrics["doubted_pairs"] = jnp.mean((probabilities < 0.5).astype(jnp.float32))

    def loss_of(image_emb: jax.Array, text_emb: jax.Array) -> tuple[jax.Array, Metrics]:
        return sharded_loss(
            loss,
            image_emb,
            text_emb,
            jnp.exp(params["log_logit_scale"]),
            {name: params[name] for name in loss.parameters},
            settings={key: section[key] for key in loss.settings},
            mesh=mesh,
            axis_names=sharding.BATCH_AXES,
            impl=section.impl,
            pair_ids=examples.get("pair_ids"),
            pair_weights=pair_weights,
        )

    if config.matryoshka.sizes:
        sizes = weighted_sizes(config.matryoshka, image_emb.shape[1])
        total, of_loss = loss_of_sizes(loss_of, image_emb, text_emb, sizes=sizes)
    else:
        total, of_loss = loss_of(image_emb, text_emb)
    return total, {**of_loss, **metrics}, None
