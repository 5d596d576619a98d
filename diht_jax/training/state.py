"""The training state: everything that one step reads and writes.

Created by the training loop, directly in its sharded form; saved and restored by `checkpoint`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from diht_jax import sharding


@flax.struct.dataclass
class TrainState:
    """Parameters, optimiser state, step and random key.

    Attributes:
        step: int32 scalar, optimiser steps done.
        params: nested dict of arrays, keys are strings.
        opt_state: optax state.
        key_data: uint32 data of the run's random key; a step folds its number into it.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key_data: jax.Array


def create_state(
    init_params: Callable[[jax.Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
) -> TrainState:
    """Initialises the state on the mesh; no device ever holds more than its part."""
    init = state_initializer(init_params, optimizer)
    shardings = sharding.tree_shardings(jax.eval_shape(init, seed), mesh)
    return jax.jit(init, out_shardings=shardings)(seed)


def abstract_state(
    init_params: Callable[[jax.Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without any array."""
    return _with_shardings(jax.eval_shape(state_initializer(init_params, optimizer), 0), mesh)


def abstract_parameters(
    init_params: Callable[[jax.Array], dict[str, Any]], mesh: Mesh
) -> dict[str, Any]:
    """Shapes, dtypes and shardings of the parameters, without any array."""
    return _with_shardings(jax.eval_shape(init_params, jax.random.key(0)), mesh)


def _with_shardings(shapes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def state_initializer(
    init_params: Callable[[jax.Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
) -> Callable[[jax.Array], TrainState]:
    """The function from a seed to a state."""

    def init(seed: jax.Array) -> TrainState:
        params_key, run_key = jax.random.split(jax.random.key(seed))
        params = init_params(params_key)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            key_data=jax.random.key_data(run_key),
        )

    return init
