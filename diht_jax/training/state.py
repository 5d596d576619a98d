"""The training state: everything that one step reads and writes."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class TrainState:
    """Parameters, optimiser state, step, random key, and what averages and losses keep.

    Attributes:
        step: int32 scalar, optimiser steps done.
        params: nested dict of arrays, keys are strings.
        opt_state: optax state.
        key_data: uint32 data of the run's random key; a step folds its number into it.
        ema_params: moving average of all parameters, like `params` in at least float32; None
            where `config.ema.decay` is not set.
        record_means: what the loss keeps of each record; None where it keeps nothing.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    key_data: jax.Array
    ema_params: Any = None
    record_means: Any = None


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
