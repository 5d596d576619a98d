"""Checksums of the training state, by which a checkpoint is known to be what was saved.

Orbax checks its index files, but not the values: it restores an array file with a flipped bit
without an error.
"""

from __future__ import annotations

import json
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np

from diht_jax.sharding import path_name


def tree_checksums(tree: Any) -> dict[str, int]:
    """Checksums of 32 bits, one for each array, the same on any mesh.

    `sum_i bits_i (2 i + 1)` modulo 2^32, with `bits_i` the value at index i as an unsigned integer.
    Integer sums do not depend on their order, hence not on how an array is split; the weights are
    odd, so any single flipped bit changes the number, and exchanged values do, too. Computed on
    the arrays' own devices. Ours.

    Args:
        tree: arrays, of values up to 32 bits wide. In a job of several processes all must call.

    Returns:
        Path such as `params/vision/projection/kernel` -> number in [0, 2^32).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    sums = np.asarray(_checksums([leaf for _, leaf in leaves]))
    return {path_name(path): int(s) for (path, _), s in zip(leaves, sums, strict=True)}


def describe_difference(saved: dict[str, int], tree: Any) -> str | None:
    """Names arrays that are not those that were saved; None if all are. All processes must call.

    Args:
        saved: of `tree_checksums`.
        tree: as restored.
    """
    found = tree_checksums(tree)
    wrong = sorted(p for p in saved.keys() | found.keys() if saved.get(p) != found.get(p))
    return f"values differ from what was saved in {', '.join(wrong[:3])}" if wrong else None


def json_checksum(value: Any) -> int:
    """CRC32C of a JSON-able value."""
    return google_crc32c.value(json.dumps(value, sort_keys=True).encode())


@jax.jit
def _checksums(arrays: list[jax.Array]) -> jax.Array:
    # One program for all: on CPU devices, many small ones with sums over devices can wait for each
    # other for ever.
    return jnp.stack([_checksum(array) for array in arrays])


def _checksum(array: jax.Array) -> jax.Array:
    array = jnp.asarray(array)
    width = array.dtype.itemsize
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * width}"))
    bits = bits.astype(jnp.uint32)
    index = jnp.zeros(array.shape, jnp.uint32)
    for axis, stride in enumerate(_strides(array.shape)):
        steps = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        index += steps * jnp.uint32(stride % 2**32)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    return [int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape))]
