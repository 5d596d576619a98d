"""The training state: everything that one step reads and writes.

It is created directly in its sharded form.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from diht_jax import sharding


@flax.struct.dataclass
class TrainState:
    """Parameters, optimiser state, step, random key and the parameters' moving average.

    Attributes:
        step: int32 scalar, optimiser steps done.
        params: nested dict of arrays, keys are strings.
        opt_state: optax state.
        key_data: uint32 data of the run's random key; a step folds its number into it.
        ema_params: moving average of all parameters, like `params` in at least float32; None
            where `config.ema.decay` is not set.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key_data: jax.Array
    ema_params: Any = None


def create_state(
    init_params: Callable[[jax.Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    seed: int,
    *,
    ema: bool = False,
) -> TrainState:
    """Initialises the state on the mesh; no device ever holds more than its part."""
    init = functools.partial(_draw_state, init_params, optimizer, ema)
    # As a Python int it would be an int32, which half of the seeds exceed.
    seed = np.uint32(seed)
    shardings = sharding.tree_shardings(jax.eval_shape(init, seed), mesh)
    return jax.jit(init, out_shardings=shardings)(seed)


def abstract_state(
    init_params: Callable[[jax.Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without any array."""
    shapes = jax.eval_shape(functools.partial(_draw_state, init_params, optimizer, ema), 0)
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        shapes,
        sharding.tree_shardings(shapes, mesh),
    )


def _draw_state(
    init_params: Callable[[jax.Array], dict[str, Any]],
    optimizer: optax.GradientTransformation,
    ema: bool,
    seed: jax.Array,
) -> TrainState:
    params_key, run_key = jax.random.split(jax.random.key(seed))
    params = init_params(params_key)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        key_data=jax.random.key_data(run_key),
        ema_params=initial_average(params) if ema else None,
    )


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
        params: after the step.
        decay: in [0, 1).
        step: int32 scalar, optimiser steps done before this one.
    """
    weight = 1.0 - jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda a, p: a + weight * (p.astype(a.dtype) - a), average, params)
