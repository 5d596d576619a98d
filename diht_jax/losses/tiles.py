"""What the streaming losses do with tiles of rows, inside of `shard_map` or outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def product(grad: jax.Array, emb: jax.Array, axis: int) -> jax.Array:
    """[t, u] x [u, d] summed over u for axis 1; x [t, d] summed over t for axis 0."""
    return jax.lax.dot_general(
        grad,
        emb.astype(grad.dtype),
        (((axis,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )


def zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Of the dtype of `like`, and varying over the mesh as it does."""
    return varying_over(varying_axes(like))(jnp.zeros(shape, like.dtype))


def varying_over(axes: frozenset[str]) -> Callable[[jax.Array], jax.Array]:
    """A function that lets an array differ from device to device along these mesh axes."""

    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return cast


def varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` differs from device to device; empty without check_vma."""
    return jax.typeof(x).manual_axis_type.varying


def at(tree: Any, index: jax.Array | int) -> Any:
    """The tile of a number, of each array [num_tiles, ...] of a tree."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def put(tree: Any, part: Any, index: jax.Array | int) -> Any:
    """The tree with another tile of a number; the inverse of `at`."""
    return jax.tree.map(
        lambda x, p: jax.lax.dynamic_update_index_in_dim(x, p, index, 0), tree, part
    )
