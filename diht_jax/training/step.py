"""The training state, and the optimiser step as a pure function of (state, batch).

Within `jax.shard_map` each device encodes its own rows, optionally in micro-batches; only
parameters are communicated. The losses are computed afterwards over the global batch. Metrics are
a dict of scalars, averaged and written elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Shaped

from diht_jax import sharding
from diht_jax.input.transforms import Preprocessing, normalize
from diht_jax.losses.objective import Term
from diht_jax.models.attention import target_of
from diht_jax.models.dual_encoder import choose_patches, l2_normalize
from diht_jax.models.parameters import ModelDefinition, merge_model, stack_blocks
from diht_jax.models.transformer import Execution
from diht_jax.models.zoo import Architecture
from diht_jax.training.objective import active_terms, total_loss
from diht_jax.training.optimizer import merge_parameters, split_parameters
from diht_jax.training.recipe import pictures_of

Metrics = dict[str, Float[Array, ""]]
Tree = Any
# Maps (params, examples), nested dicts of parameters and of arrays [b, ...], to a nested dict of
# arrays [b, ...]. Row i must depend on example i alone, which makes micro-batches possible.
# Per-example results other than embeddings, such as the losses of concept heads, are returned in
# the same way.
Encode = Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]

# Name scope of the optimiser's operations in jaxprs and profiles.
OPTIMIZER_SCOPE = "optimizer"


@flax.struct.dataclass
class TrainState:
    """Parameters, optimiser state, step, random key, moving average, and state of the loss."""

    step: jax.Array  # int32 scalar, optimiser steps done
    params: Any  # nested dict of arrays, keys are strings
    opt_state: Any  # optax state
    key_data: jax.Array  # uint32 data of the run's random key; each step folds in its number
    # Moving average of all parameters, in at least float32; None unless `config.ema.decay`
    # is set.
    ema_params: Any = None
    record_means: Any = None  # the loss's state per record; None for a loss without state


def initial_average(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the initial moving average: the parameters, in at least float32.

    In bfloat16 an average would not move: its updates are below the format's resolution.
    """
    return jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), params)


def update_average(
    average: dict[str, Any], params: dict[str, Any], decay: float, step: jax.Array
) -> dict[str, Any]:
    """Computes `average + (1 - d) (params - average)`, `d = min(decay, (1 + step) / (10 + step))`.

    The increasing `d`, as in TensorFlow's `ExponentialMovingAverage`, makes the average forget the
    random initialisation within the first steps instead of after `1 / (1 - decay)` steps.

    Args:
        average: see `TrainState.ema_params`.
        decay: in [0, 1).
        step: int32 scalar, number of optimiser steps before this one.
    """
    weight = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + weight * (p.astype(a.dtype) - a), average, params)


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    config: ml_collections.ConfigDict,
) -> tuple[TrainState, Metrics]:
    """Performs one update; returns the new state and float32 scalar metrics.

    Args:
        state: sharded by the partition rules.
        batch: `images` uint8 [N, h, w, 3] and `tokens` int32 [N, t], sharded over the mesh, and the
            further inputs of losses and terms.
        optimizer: the optimiser that created `state`.
        schedule: learning rate by step, for the metrics.
    """
    grads, metrics, means = loss_gradients(
        state, batch, definition=definition, mesh=mesh, config=config
    )
    trained, frozen = split_parameters(config.optimizer, state.params)
    grad_norm = optax.tree.norm(grads)
    with jax.named_scope(OPTIMIZER_SCOPE):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = merge_parameters(optax.apply_updates(trained, updates), frozen)
    if "log_logit_scale" in trained:
        params["log_logit_scale"] = jnp.minimum(
            params["log_logit_scale"], math.log(config.optimizer.max_logit_scale)
        )
    metrics = {
        **metrics,
        "logit_scale": jnp.exp(state.params["log_logit_scale"]),
        "grad_norm": grad_norm,
        "param_norm": optax.tree.norm(params),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    ema_params = state.ema_params
    if ema_params is not None:
        ema_params = update_average(ema_params, params, config.ema.decay, state.step)
    # A bad batch must not undo weeks of training: a non-finite update leaves the state unchanged.
    is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
    params, opt_state, ema_params, means = jax.tree.map(
        lambda new, old: jnp.where(is_finite, new, old),
        (params, opt_state, ema_params, means),
        (state.params, state.opt_state, state.ema_params, state.record_means),
    )
    metrics["skipped"] = 1.0 - is_finite.astype(jnp.float32)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        key_data=state.key_data,
        ema_params=ema_params,
        record_means=means,
    )
    return new_state, metrics


def loss_gradients(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    definition: ModelDefinition,
    mesh: Mesh,
    config: ml_collections.ConfigDict,
) -> tuple[dict[str, Any], Metrics, Any]:
    """Computes the gradient of the global loss by the trained parameters, and metrics.

    The last result is the loss's new state per record, as in `TrainState.record_means`.
    """
    terms = active_terms(config)
    examples = with_kept_patches(state, batch, definition.arch, config.model.patch_dropout, mesh)
    num_rows = len(batch["tokens"])
    encode = functools.partial(
        encode_examples,
        definition=definition,
        terms=terms,
        gather=sharding.ParameterGather(state.params, mesh, jnp.dtype(definition.dtype)),
        pictures=pictures_of(config),
    )
    # Differentiating by the trained parameters alone avoids the backward pass of a locked tower.
    trained, frozen = split_parameters(config.optimizer, state.params)
    split = sharding.tree_shardings((trained, frozen), mesh)
    rows = PartitionSpec(sharding.BATCH_AXES)
    kept = None if state.record_means is None else (state.record_means, state.step)

    # Each device encodes its own rows. The transposed `shard_map` sums each gradient over devices
    # once, after the last micro-batch, in the parameter's dtype; it is sharded like the parameters.
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(*jax.tree.map(lambda leaf: leaf.spec, split), rows),
        out_specs=rows,
        check_vma=False,
    )
    def encode_rows(trained: Tree, frozen: Tree, examples: Tree) -> Tree:
        params = merge_parameters(trained, frozen)
        if definition.execution.scan_layers:  # stacked once for all micro-batches
            params = stack_blocks(params)
        return encode_in_parts(
            encode, params, examples, num_rows // (config.micro_batch or num_rows)
        )

    def loss_fn(trained: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        encoded = encode_rows(trained, frozen, examples)
        params = merge_parameters(trained, frozen)
        loss, metrics, means = total_loss(
            encoded, params, examples, terms=terms, mesh=mesh, config=config, kept=kept
        )
        return loss, (metrics, means)

    (_, (metrics, means)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    return grads, metrics, means


def encode_in_parts(encode: Encode, params: Tree, examples: Tree, count: int) -> Tree:
    """Computes `encode(params, examples)` with memory for one of `count` micro-batches.

    The gradient is the same. The forward pass keeps only the results. The backward pass receives
    their cotangents from a loss over the whole batch, and encodes each micro-batch again to
    backpropagate its part. Results are exact if `encode` treats examples independently; random keys
    must be part of the examples. Source: GradCache (Gao et al. 2021, arXiv 2101.06983).

    Args:
        encode: function of parameters and `b / count` examples.
        count: number of micro-batches; divides b.
    """
    if count == 1:
        return encode(params, examples)
    dtypes = jax.tree.map(lambda p: p.dtype, params)
    # Gradients are summed in at least float32, since the sum is long.
    wide = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def encode_part(wide: Tree, part: Tree) -> Tree:
        return encode(jax.tree.map(lambda p, dtype: p.astype(dtype), wide, dtypes), part)

    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), examples)
    # Reversed, so that the backward pass runs from the first micro-batch to the last.
    _, encoded = jax.lax.scan(
        lambda _, part: (None, encode_part(wide, part)), None, parts, reverse=True
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), encoded)


def encode_examples(
    params: dict[str, Any],
    examples: dict[str, Shaped[Array, "b ..."]],
    *,
    definition: ModelDefinition,
    terms: Sequence[Term],
    gather: sharding.ParameterGather | None,
    pictures: Preprocessing,
) -> dict[str, Float[Array, "b ..."]]:
    """Embeds examples on one device, from its shard of the parameters.

    Args:
        params: this device's shard of every parameter.
        examples: `images` uint8 [b, h, w, 3], `tokens` int32 [b, t]; with patch dropout,
            `kept_patches` int32 [b, k]; the labels that terms read.
        gather: gathers sharded parameters; None if they are not sharded.
        pictures: mean and standard deviation of the images.

    Returns:
        `image_emb` and `text_emb`, float32 [b, d], L2-normalised; losses of terms, float32 [b].
    """
    params = gather(params) if gather else params
    model = merge_model(definition, params)
    reads_tokens = any(term.reads_image_tokens for term in terms)
    seen = (model.vision.tokens if reads_tokens else model.vision.features)(
        normalize(
            examples["images"], jnp.dtype(definition.dtype), mean=pictures.mean, std=pictures.std
        ),
        kept_patches=examples.get("kept_patches"),
        gather=gather.block("vision") if gather else None,
    )
    pooled = model.vision.pool_tokens(seen) if reads_tokens else seen
    projected = model.vision.projection(pooled)
    encoded = {"image_emb": l2_normalize(projected)}
    text_gather = gather.block("text") if gather else None
    encoded["text_emb"] = model.encode_text(examples["tokens"], gather=text_gather)
    features = {"pooled": pooled, "projected": projected, **encoded}
    if reads_tokens:
        features["image_tokens"] = seen
    for term in terms:
        encoded.update(term.of_examples(params, features, examples))
    return encoded


def with_kept_patches(
    state: TrainState, batch: dict[str, jax.Array], arch: Architecture, share: float, mesh: Mesh
) -> dict[str, jax.Array]:
    """Adds to the batch, with patch dropout, the indices of the patches that each image keeps.

    Drawn for the global batch, so independent of the mesh and the micro-batches.
    """
    if share <= 0.0:
        return batch
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
    kept = choose_patches(key, batch["images"].shape[0], arch.num_patches, share)
    by_example = sharding.batch_sharding(mesh)
    return {**batch, "kept_patches": jax.lax.with_sharding_constraint(kept, by_example)}


def training_execution(config: ml_collections.ConfigDict, mesh: Mesh) -> Execution:
    """Returns the execution options of the step, from `config.model` and the mesh's devices.

    The mesh may belong to another machine; see `diht_jax.compile`.
    """
    return Execution(
        scan_layers=config.scan_layers,
        remat=config.remat,
        attention=config.attention,
        target=target_of(mesh.devices.flat[0]),
    )
