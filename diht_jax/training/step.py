"""The training state and the optimiser step, a pure function of (state, batch).

Inside of `jax.shard_map` each device encodes its own rows, in micro-batches where that is asked
for: nothing but parameters is ever sent. The losses come on top, over the global batch. Metrics are
a dict of scalars; averaging and writing them is done elsewhere.
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
# From (params, examples), nested dicts of the parameters and of arrays [b, ...], to a nested dict
# of arrays [b, ...] of which row i depends on example i alone: this makes micro-batches possible.
# Results for one example other than embeddings, such as the losses of concept heads, are returned
# the same way.
Encode = Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]

# Name of the optimiser's operations in jaxprs and profiles.
OPTIMIZER_SCOPE = "optimizer"


@flax.struct.dataclass
class TrainState:
    """Parameters, optimiser state, step, random key, and what averages and losses keep."""

    step: jax.Array  # int32 scalar, optimiser steps done
    params: Any  # nested dict of arrays, keys are strings
    opt_state: Any  # optax state
    key_data: jax.Array  # uint32 data of the run's random key; a step folds its number into it
    # Moving average of all parameters, like `params` in at least float32; None where
    # `config.ema.decay` is not set.
    ema_params: Any = None
    record_means: Any = None  # what the loss keeps of each record; None where it keeps nothing


def initial_average(params: dict[str, Any]) -> dict[str, Any]:
    """The moving average before the first step: the parameters, in at least float32.

    In bfloat16 an average would stand still: its step is below the format's resolution.
    """
    return jax.tree.map(lambda p: jnp.array(p, jnp.promote_types(p.dtype, jnp.float32)), params)


def update_average(
    average: dict[str, Any], params: dict[str, Any], decay: float, step: jax.Array
) -> dict[str, Any]:
    """`average + (1 - d) (params - average)` with `d = min(decay, (1 + step) / (10 + step))`.

    The rising `d`, that of TensorFlow's `ExponentialMovingAverage`, lets the average forget the
    random initialisation within the first steps instead of after `1 / (1 - decay)`.

    Args:
        average: as in `TrainState.ema_params`.
        decay: in [0, 1).
        step: int32 scalar, optimiser steps done before this one.
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
    """The state after one update, and float32 scalars.

    Args:
        state: sharded by the partition rules.
        batch: `images` uint8 [N, h, w, 3] and `tokens` int32 [N, t], split over the mesh, and what
            losses and terms read besides.
        optimizer: as used to create `state`.
        schedule: the learning rate by step, for the metrics.
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
    # One bad batch must not undo weeks: without finite numbers everything stays as it was.
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
    """The gradient of the global batch's loss by the trained parameters, and metrics.

    Last comes what the loss keeps of each record after this batch, as `TrainState.record_means`.
    """
    terms = active_terms(config)
    examples = with_kept_patches(state, batch, definition.arch, config.model.patch_dropout, mesh)
    encode = functools.partial(
        encode_examples,
        definition=definition,
        terms=terms,
        gather=sharding.ParameterGather(state.params, mesh, jnp.dtype(definition.dtype)),
        pictures=pictures_of(config),
    )
    # Differentiating by the trained parameters alone spares a locked tower its backward pass.
    trained, frozen = split_parameters(config.optimizer, state.params)

    kept = None if state.record_means is None else (state.record_means, state.step)

    def loss_fn(trained: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        encoded = encode_on_mesh(
            encode,
            trained,
            frozen,
            examples,
            mesh=mesh,
            micro_batch=config.micro_batch,
            scan_layers=definition.execution.scan_layers,
        )
        params = merge_parameters(trained, frozen)
        loss, metrics, means = total_loss(
            encoded, params, examples, terms=terms, mesh=mesh, config=config, kept=kept
        )
        return loss, (metrics, means)

    (_, (metrics, means)), grads = jax.value_and_grad(loss_fn, has_aux=True)(trained)
    return grads, metrics, means


def encode_on_mesh(
    encode: Encode,
    trained: dict[str, Any],
    frozen: dict[str, Any],
    examples: dict[str, jax.Array],
    *,
    mesh: Mesh,
    micro_batch: int | None = None,
    scan_layers: bool = False,
) -> dict[str, jax.Array]:
    """Encodes the global batch, each device its own rows.

    Differentiable with respect to `trained`, whose gradient is summed over all devices and
    sharded like the parameters.

    Args:
        encode: gets this device's part of every parameter, to be made whole with
            `sharding.ParameterGather`.
        trained: nested dict of parameters, sharded by the partition rules, layer by layer.
        examples: arrays [N, ...], split over the mesh by rows.
        micro_batch: examples, over all devices, to encode at once; see `in_micro_batches`.
        scan_layers: `encode` wants the blocks stacked.

    Returns:
        What `encode` returns, [N, ...], split over the mesh by rows.
    """
    split = sharding.tree_shardings((trained, frozen), mesh)
    rows = PartitionSpec(sharding.BATCH_AXES)
    batch_size = next(iter(examples.values())).shape[0]
    count = batch_size // (micro_batch or batch_size)

    def encode_rows(trained, frozen, examples):
        params = merge_parameters(trained, frozen)
        # Once for all micro-batches.
        params = stack_blocks(params) if scan_layers else params
        if count == 1:
            return encode(params, examples)
        return in_micro_batches(encode, count)(params, examples)

    # Sums over devices are those of the transposed `shard_map`: one for each parameter, after the
    # last micro-batch, in the parameter's dtype.
    return jax.shard_map(
        encode_rows,
        mesh=mesh,
        in_specs=(*jax.tree.map(lambda leaf: leaf.spec, split), rows),
        out_specs=rows,
        check_vma=False,
    )(trained, frozen, examples)


def in_micro_batches(encode: Encode, count: int) -> Encode:
    """`encode` with memory for one of `count` micro-batches at a time, and the same gradient.

    The forward pass keeps only its results. The backward pass gets their cotangents, which a loss
    over the whole batch has made, and encodes each micro-batch again to propagate its part back.
    Results are exact where `encode` treats every example apart; randomness must come with the
    examples. Source: GradCache (Gao et al. 2021, arXiv 2101.06983).

    Args:
        encode: from parameters and `b / count` examples.
        count: of micro-batches; divides b.
    """

    def encode_all(params: Tree, examples: Tree) -> Tree:
        dtypes = jax.tree.map(lambda p: p.dtype, params)
        # Gradients are summed in at least float32: this is a long sum.
        wide = jax.tree.map(lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32)), params)

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def encode_part(wide: Tree, part: Tree) -> Tree:
            return encode(jax.tree.map(lambda p, dtype: p.astype(dtype), wide, dtypes), part)

        parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), examples)
        # From the last to the first, so that the backward pass goes from the first to the last.
        _, encoded = jax.lax.scan(
            lambda _, part: (None, encode_part(wide, part)), None, parts, reverse=True
        )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), encoded)

    return encode_all


def encode_examples(
    params: dict[str, Any],
    examples: dict[str, Shaped[Array, "b ..."]],
    *,
    definition: ModelDefinition,
    terms: Sequence[Term],
    gather: sharding.ParameterGather | None,
    pictures: Preprocessing,
) -> dict[str, Float[Array, "b ..."]]:
    """Embeds examples on one device, from its part of the parameters.

    Args:
        params: this device's part of every parameter.
        examples: `images` uint8 [b, h, w, 3], `tokens` int32 [b, t], and `kept_patches` int32
            [b, k] where patches are dropped; labels where terms read them.
        gather: makes parameters whole; None where they are.
        pictures: mean and deviation of the images.

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
    """The batch and, where patches are dropped, which of each image stay.

    Drawn for the global batch, so that they depend neither on the mesh nor on the micro-batches.
    """
    if share <= 0.0:
        return batch
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key_data), state.step)
    kept = choose_patches(key, batch["images"].shape[0], arch.num_patches, share)
    by_example = sharding.batch_sharding(mesh)
    return {**batch, "kept_patches": jax.lax.with_sharding_constraint(kept, by_example)}


def training_execution(config: ml_collections.ConfigDict, mesh: Mesh) -> Execution:
    """Execution of the step, from the config section `model` and the devices of the mesh.

    The mesh may be of another machine than this one; see `diht_jax.compile`.
    """
    return Execution(
        scan_layers=config.scan_layers,
        remat=config.remat,
        attention=config.attention,
        target=target_of(mesh.devices.flat[0]),
    )
