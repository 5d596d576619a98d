"""The optimiser: clipped AdamW or Muon, learning rates per parameter, and frozen parameters.

The config section `optimizer` sets the schedule, frozen towers, multipliers and layer-wise decay.
Parameters are named by their path, such as `vision/blocks/3/mlp/fc_in/kernel`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from diht_jax import sharding
from diht_jax.models.parameters import frozen_by_adapters
from diht_jax.sharding import path_name

_BLOCK = re.compile(r"^(\w+)/blocks/(\d+)/")
_EMBEDDING = re.compile(
    r"^\w+/(patch_embedding|class_embedding|positional_embedding|token_embedding|pre_norm)(/|$)"
)


def learning_rate_schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Creates a schedule with linear warm-up from 0 to the peak and a decay to the final value.

    "cosine" decays along half a cosine. "wsd" (warm-up, stable, decay) stays at the peak until
    `decay_steps` before the end, then follows 1 - sqrt, the best form in the comparison of arXiv
    2405.18392. Until that point the run does not depend on its total length.
    """
    if not 0 <= config.warmup_steps < total_steps:
        raise ValueError(
            f"config.optimizer.warmup_steps={config.warmup_steps}: expected less than the "
            f"{total_steps} steps of the run; shorten the warm-up or train longer"
        )
    first_decayed = decay_start(config, total_steps)
    if config.schedule == "cosine":
        return optax.schedules.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=config.learning_rate,
            warmup_steps=config.warmup_steps,
            decay_steps=total_steps,
            end_value=config.final_learning_rate,
        )

    def schedule(step: Any) -> jax.Array:
        warmed = jnp.minimum(step / config.warmup_steps, 1.0) if config.warmup_steps else 1.0
        decayed = jnp.sqrt(jnp.clip((step - first_decayed) / config.decay_steps, 0.0, 1.0))
        fall = config.learning_rate - config.final_learning_rate
        return config.learning_rate * warmed - fall * decayed

    return schedule


def decay_start(config: ml_collections.ConfigDict, total_steps: int) -> int:
    """Returns the number of initial steps that do not depend on the length of the run."""
    if config.schedule == "cosine":
        if config.decay_steps is not None:
            raise ValueError(
                f"config.optimizer.decay_steps={config.decay_steps} is of "
                "config.optimizer.schedule='wsd'; a cosine goes down until the end of the run"
            )
        return 0
    most = total_steps - config.warmup_steps
    if config.decay_steps is None or config.decay_steps > most:
        raise ValueError(
            f"config.optimizer.decay_steps={config.decay_steps}: expected at most {most}, the "
            f"{total_steps} steps of the run without the {config.warmup_steps} of the warm-up"
        )
    return total_steps - config.decay_steps


def create_optimizer(
    config: ml_collections.ConfigDict, schedule: optax.Schedule, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Creates global-norm clipping, then AdamW or Muon with the factors of `update_rules`.

    `init(params)` takes all parameters and creates moments for the trained ones only.
    `update(grads, state, params)` takes gradients of the trained parameters
    (`split_parameters`) and all parameters, and returns updates of the trained ones.
    """
    scale = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.kind == "muon":
        matrices = scale_by_muon(config.muon.momentum, config.muon.rms, mesh)
        scale = optax.partition({"muon": matrices, "adam": scale}, _muon_or_adam)
    inner = optax.chain(
        optax.clip_by_global_norm(config.clip_global_norm),
        scale,
        _decay_and_scale(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )

    def init(params: Any) -> optax.OptState:
        return inner.init(split_parameters(config, params)[0])

    def update(updates: Any, state: optax.OptState, params: Any = None) -> Any:
        rules = update_rules(config, params)
        return inner.update(updates, state, split_parameters(config, params)[0], rules=rules)

    return optax.GradientTransformation(init, update)


def _muon_or_adam(params: dict[str, Any]) -> dict[str, Any]:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if is_block_matrix(path_name(path)) else "adam", params
    )


def _decay_and_scale(weight_decay: float) -> optax.GradientTransformationExtraArgs:
    """Computes `factor * (update + weight_decay * parameter)` with factors per parameter."""

    def update(updates: Any, state: Any, params: Any = None, *, rules: Any = None) -> Any:
        def apply(path, update, param):
            rule = rules[path_name(path)]
            if decay := weight_decay * rule.weight_decay:
                update = update + decay * param
            return rule.learning_rate * update

        return jax.tree_util.tree_map_with_path(apply, updates, params), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """Factors for the update of one parameter."""

    frozen: bool  # has neither updates nor optimiser moments
    learning_rate: float  # factor on the schedule's value
    weight_decay: float  # factor on `config.optimizer.weight_decay`; 0 for vectors and scalars


def update_rules(config: ml_collections.ConfigDict, params: Any) -> dict[str, UpdateRule]:
    """Returns the update rule of every parameter, keyed by path.

    The factor on the learning rate is that of the first of `multipliers` whose pattern matches,
    times `layer_decay ** (layers above)`. The last block of a tower has one layer above it (final
    norm and projection, with factor 1), and the embeddings have all of them. This is BEiT's
    counting (arXiv 2106.08254), applied to each tower. Weight decay applies to matrices and higher
    ranks only: not to biases, LayerNorm, class token and logit scale. Positional embeddings are
    matrices by shape and are decayed, as in open_clip. Frozen are the parameters that match a
    pattern of `frozen`, and with adapters (`models.parameters`) the rest of the model.

    Raises:
        ValueError: a pattern is no regular expression or matches no name, a factor is
            negative or no number, or no parameter is trained.
    """
    flat = flatten_dict(params, sep="/")
    frozen = [_pattern("frozen", text, flat) for text in config.frozen]
    multipliers = [_multiplier(entry, flat) for entry in config.multipliers]
    beside_adapters = frozen_by_adapters(flat)
    num_blocks = {} if config.layer_decay is None else _num_blocks(flat)
    rules = {}
    for name, leaf in flat.items():
        found = (factors for pattern, *factors in multipliers if pattern.search(name))
        rate, weight_decay = next(found, (1.0, 1.0))
        if config.layer_decay is not None:
            rate *= config.layer_decay ** _layers_above(name, num_blocks)
        rules[name] = UpdateRule(
            frozen=name in beside_adapters or any(pattern.search(name) for pattern in frozen),
            learning_rate=rate,
            weight_decay=weight_decay if leaf.ndim >= 2 else 0.0,
        )
    if all(rule.frozen for rule in rules.values()):
        raise ValueError(
            f"config.optimizer.frozen={tuple(config.frozen)} freezes every parameter; leave some "
            "to train"
        )
    return rules


def split_parameters(
    config: ml_collections.ConfigDict, params: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits `params` into trained and frozen parts, as nested dicts with disjoint leaves.

    Differentiating with respect to the trained part alone avoids the backward pass of a locked
    tower.
    """
    flat = flatten_dict(params, sep="/")
    if not config.frozen and not frozen_by_adapters(flat):
        return params, {}
    rules = update_rules(config, params)
    trained = {name: leaf for name, leaf in flat.items() if not rules[name].frozen}
    frozen = {name: leaf for name, leaf in flat.items() if rules[name].frozen}
    return unflatten_dict(trained, sep="/"), unflatten_dict(frozen, sep="/")


def merge_parameters(a: optax.Params, b: optax.Params) -> dict[str, Any]:
    """Joins two nested dicts into one with the leaves of both; inverts `split_parameters`."""
    return unflatten_dict({**flatten_dict(a), **flatten_dict(b)})


def _layers_above(name: str, num_blocks: dict[str, int]) -> int:
    block = _BLOCK.match(name)
    if block:
        return num_blocks[block[1]] - int(block[2])
    if _EMBEDDING.match(name):
        return num_blocks.get(name.split("/")[0], 0) + 1
    return 0


def _num_blocks(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for block in filter(None, map(_BLOCK.match, names)):
        counts[block[1]] = max(counts.get(block[1], 0), int(block[2]) + 1)
    return counts


def _multiplier(entry: Any, names: Iterable[str]) -> tuple[re.Pattern, float, float]:
    try:
        text, *factors = entry
        rate, weight_decay = map(float, factors)
    except (TypeError, ValueError):
        rate = weight_decay = -1.0
    if not (0 <= rate < math.inf and 0 <= weight_decay < math.inf):
        raise ValueError(
            "config.optimizer.multipliers: expected entries (pattern, learning-rate factor, "
            f"weight-decay factor) with factors of at least 0, got {entry!r}"
        )
    return _pattern("multipliers", text, names), rate, weight_decay


def _pattern(key: str, text: Any, names: Iterable[str]) -> re.Pattern:
    try:
        pattern = re.compile(text)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"config.optimizer.{key}: expected a regular expression, got {text!r} ({error})"
        ) from error
    names = sorted(names)
    if not any(pattern.search(name) for name in names):
        raise ValueError(
            f"config.optimizer.{key}: '{text}' is found in no parameter's name; names are such as "
            f"{', '.join(names[:: max(1, len(names) // 4)])}"
        )
    return pattern


# a x + (b A + c A A) x, with A = x x^T, moves singular values close to 1 in five iterations.
MUON_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MUON_ROUNDS = 5

# Matrices of the towers' blocks; AdamW updates all other parameters.
_MATRIX = re.compile(r"^(\w+/blocks/)\d+(/.*(in_proj|[qkv]_proj|out_proj|fc_in|fc_out)/kernel)$")


def is_block_matrix(name: str) -> bool:
    """Returns whether the parameter of this path is a matrix that Muon updates."""
    return _MATRIX.search(name) is not None


def scale_by_muon(
    momentum: float, rms: float, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """Muon: orthogonalised Nesterov momentum, scaled to a fixed root mean square.

    A block has four matrices: the joined queries, keys and values, which count as three, the output
    projection of the attention, and the two of the MLP. Each is orthogonalised separately.
    Parameters are stored per layer, so a layer axis is never taken for a matrix axis.

    `optax.contrib.muon` works leaf by leaf. Here matrices of one kind are stacked: a model of 36
    layers compiles 8 chains of products instead of 144. A device that holds a slice of every layer
    receives a few whole layers instead, with one exchange along `fsdp` in each direction. Products
    of whole matrices need no sums over devices, and the result does not depend on the
    mesh.

    Source: K. Jordan et al., https://kellerjordan.github.io/posts/muon; size of the update: Liu et
    al., arXiv 2502.16982.

    Args:
        momentum: decay of the momentum.
        rms: root mean square of an update whose singular values are all 1; 0.2 is close to AdamW's,
            which allows the same learning rate and weight decay.
        mesh: devices over which the partition rules split the gradients; None for one device.
    """

    def update(updates, state, params=None):
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        named = {path_name(path): leaf for path, leaf in leaves}
        orthogonal = _orthogonalize_all(named, rms, mesh)
        return structure.unflatten([orthogonal[name] for name in named]), state

    orthogonalize = optax.GradientTransformation(optax.init_empty_state, update)
    return optax.chain(optax.trace(momentum, nesterov=True), orthogonalize)


def orthogonalize(matrices: Float[Array, "*layers m n"]) -> Float[Array, "*layers m n"]:
    """Moves the singular values of matrices close to 1; zeros stay zeros.

    Products use the device's default (fastest) precision, which the iteration tolerates.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = jnp.swapaxes(matrices, -1, -2) if is_tall else matrices
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True)) + 1e-8)
    a, b, c = MUON_COEFFICIENTS
    for _ in range(MUON_ROUNDS):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return jnp.swapaxes(x, -1, -2) if is_tall else x


def _orthogonalize_all(
    named: dict[str, jax.Array], rms: float, mesh: Mesh | None
) -> dict[str, jax.Array]:
    """Returns the updates by parameter name, computed for all layers of a kind at once."""
    kinds: dict[str, list[str]] = {}
    for name in named:
        kinds.setdefault(_MATRIX.sub(r"\1*\2", name), []).append(name)
    updates = {}
    for kind, names in kinds.items():
        layers = jnp.stack([named[name] for name in names])
        if mesh is None or mesh.shape[sharding.FSDP] == 1:
            layers = _update_of_layers(kind, layers, rms)
        else:
            split = sharding.partition_spec(kind, layers.shape[1:], mesh)
            missing = -len(names) % mesh.shape[sharding.FSDP]
            layers = jnp.pad(layers, [(0, missing), (0, 0), (0, 0)])
            # Between a slice of every layer and a few whole layers per device, and back.
            for spec in (PartitionSpec(None, *split), PartitionSpec(sharding.FSDP)):
                layers = jax.lax.with_sharding_constraint(layers, NamedSharding(mesh, spec))
            layers = _update_of_layers(kind, layers, rms)
            for spec in (PartitionSpec(sharding.FSDP), PartitionSpec(None, *split)):
                layers = jax.lax.with_sharding_constraint(layers, NamedSharding(mesh, spec))
        updates |= {name: layers[i] for i, name in enumerate(names)}
    return updates


def _update_of_layers(
    kind: str, layers: Float[Array, "layers m n"], rms: float
) -> Float[Array, "layers m n"]:
    """Returns orthogonalised and scaled updates for the matrices of one kind."""
    dtype, shape = layers.dtype, layers.shape
    x = layers.astype(jnp.promote_types(dtype, jnp.float32))
    if "/in_proj/" in kind:  # [m, 3 n]: queries, keys and values side by side
        x = jnp.moveaxis(x.reshape(*shape[:2], 3, shape[2] // 3), 2, 1)
    x = rms * max(x.shape[-2:]) ** 0.5 * orthogonalize(x)
    if "/in_proj/" in kind:
        x = jnp.moveaxis(x, 1, 2).reshape(shape)
    return x.astype(dtype)
