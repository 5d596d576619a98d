"""Compares both towers' attention kernels with XLA's: values, gradients, repeatability, time."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.first_hour.plan import Setting
from benchmarks.first_hour.steps import plain_config
from benchmarks.first_hour.timing import repetitions, secs_of_call
from diht_jax.models.attention import TowerAttention, attend
from diht_jax.training.program import TrainProgram

_SEQUENCES = 64
_NAMES = ("value", "q_gradient", "k_gradient", "v_gradient")


def compare(setting: Setting, model: str) -> dict[str, Any]:
    """Compares the kernels that a model's training step uses on this device, on one device."""
    config = plain_config(setting, model, batch_size=_SEQUENCES)
    program = TrainProgram(config, config.total_steps, jax.devices()[:1])
    sequences = 4 if setting.small else _SEQUENCES
    return {
        "sequences": sequences,
        "towers": {
            name: compare_tower(tower, sequences, repetitions(setting.small))
            for name, tower in program.attention().items()
        },
    }


def compare_tower(tower: TowerAttention, sequences: int, times: dict[str, int]) -> dict[str, Any]:
    """Compares one tower's kernel and XLA's on the same random sequences.

    Each difference is the largest absolute error against XLA's attention in float32, divided by the
    largest absolute value of that reference.
    """
    rng = np.random.default_rng(0)
    shape = (sequences, tower.num_tokens, tower.num_heads, tower.head_dim)
    arrays = [
        jnp.asarray(rng.standard_normal(shape, np.float32), jnp.dtype(tower.dtype))
        for _ in range(4)
    ]
    exact_arrays = [array.astype(jnp.float32) for array in arrays]
    with jax.default_matmul_precision("highest"):
        exact = _value_and_gradients("xla", tower.causal)(*exact_arrays)
    found: dict[str, Any] = {
        "kernel": tower.kernel,
        "dtype": str(jnp.dtype(tower.dtype)),
        "tokens": tower.num_tokens,
        "heads": tower.num_heads,
        "head_dim": tower.head_dim,
    }
    for kernel in dict.fromkeys(("xla", tower.kernel)):
        run = _value_and_gradients(kernel, tower.causal)
        first, second = run(*arrays), run(*arrays)
        found[f"of_{kernel}"] = {
            "difference": {
                name: _difference(ours, right)
                for name, ours, right in zip(_NAMES, first, exact, strict=True)
            },
            "same_bits_twice": all(
                np.array_equal(np.asarray(a), np.asarray(b))
                for a, b in zip(first, second, strict=True)
            ),
            "secs": secs_of_call(lambda run=run: run(*arrays), **times),
        }
    return found


def _value_and_gradients(kernel: str, causal: bool):
    attend_so = functools.partial(attend, causal=causal, implementation=kernel)

    @jax.jit
    def run(q, k, v, cotangent):
        out, pullback = jax.vjp(attend_so, q, k, v)
        return [out, *pullback(cotangent)]

    return run


def _difference(ours: jax.Array, right: jax.Array) -> float:
    return float(jnp.max(jnp.abs(ours.astype(jnp.float32) - right)) / jnp.max(jnp.abs(right)))
