"""Encoding on the mesh, and its gradients: fsdp and micro-batches.

Inside of `jax.shard_map` each device encodes its own rows: nothing but parameters is ever sent. The
caller puts a loss on top and differentiates through it. No losses over the global batch and no
optimiser may come in here.

A function that encodes takes (params, examples), nested dicts of the parameters and of arrays
[b, ...], and returns a nested dict of arrays [b, ...] of which row i depends on example i alone.
This makes micro-batches possible; results for one example other than embeddings (such as the losses
of concept heads) are returned the same way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from diht_jax import sharding
from diht_jax.models.parameters import TOWERS, stack_blocks
from diht_jax.models.transformer import Gather
from diht_jax.training.optimizer import merge_parameters

Tree = Any
Encode = Callable[[dict[str, Any], dict[str, jax.Array]], dict[str, jax.Array]]

_FSDP = "fsdp"
# Read and summed in the dtype they are stored in; see `models.dual_encoder`.
_NOT_CAST = ("token_embedding", "positional_embedding")


def check_micro_batch(micro_batch: int | None, batch_size: int, num_devices: int) -> None:
    """Raises ValueError unless every device can split its rows into equal micro-batches."""
    if micro_batch is None:
        return
    if micro_batch < 1 or batch_size % micro_batch or micro_batch % num_devices:
        raise ValueError(
            f"config.micro_batch={micro_batch}: expected a multiple of the {num_devices} devices "
            f"that divides config.data.batch_size={batch_size}"
        )


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
            `ParameterGather`.
        trained: nested dict of parameters, sharded by the partition rules, layer by layer.
        examples: arrays [N, ...], split over the mesh by rows.
        micro_batch: examples, over all devices, to encode at once; see `in_micro_batches`.
        scan_layers: `encode` wants the blocks stacked.

    Returns:
        What `encode` returns, [N, ...], split over the mesh by rows.
    """
    specs = functools.partial(_partition_specs, mesh=mesh)
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
        in_specs=(specs(trained), specs(frozen), rows),
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


class ParameterGather:
    """Makes split parameters whole where they are used, inside of `jax.shard_map`.

    What a device needs is cast to the dtype of the computation before it is sent; what comes back,
    the gradient, is summed in the dtype of the parameter and arrives split again.
    """

    def __init__(self, params: dict[str, Any], mesh: Mesh, dtype: DTypeLike):
        """Notes where each parameter is split."""
        self._dtype = dtype
        is_split = mesh.shape[_FSDP] > 1
        self._axes = {
            sharding.path_name(path): spec.index(_FSDP) if _FSDP in spec and is_split else None
            for path, spec in jax.tree_util.tree_leaves_with_path(
                _partition_specs(params, mesh), is_leaf=lambda x: isinstance(x, PartitionSpec)
            )
        }

    def block(self, tower: str) -> Gather | None:
        """Gathers one block of a tower, whose layers are split alike; None if they are whole."""
        prefix = f"{tower}/blocks/0/"
        split = [name for name, axis in self._axes.items() if axis is not None]
        if not any(name.startswith(prefix) for name in split):
            return None
        return functools.partial(self._gather, prefix=prefix)

    def outside_blocks(self, params: dict[str, Any]) -> dict[str, Any]:
        """All parameters, with those that belong to no block made whole."""
        blocks = {tower: {"blocks": params[tower]["blocks"]} for tower in TOWERS}
        others = {
            name: {k: v for k, v in value.items() if k != "blocks"} if name in TOWERS else value
            for name, value in params.items()
        }
        return merge_parameters(self._gather(others, prefix=""), blocks)

    def _gather(self, tree: dict[str, Any], prefix: str) -> dict[str, Any]:
        def gather(path, shard):
            name = prefix + sharding.path_name(path)
            axis = self._axes[name]
            if axis is None:
                return shard
            dtype = shard.dtype if any(part in name for part in _NOT_CAST) else self._dtype
            return _gather_axis(shard, axis, jnp.dtype(dtype))

        return jax.tree_util.tree_map_with_path(gather, tree)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_axis(shard: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.all_gather(shard.astype(dtype), _FSDP, axis=axis, tiled=True)


def _gather_axis_forward(shard, axis, dtype):
    # The empty array carries the dtype of the parameter to the backward pass.
    return _gather_axis(shard, axis, dtype), jnp.zeros((0,), shard.dtype)


def _gather_axis_backward(axis, dtype, kept, cotangent):
    cotangent = cotangent.astype(kept.dtype)
    return (jax.lax.psum_scatter(cotangent, _FSDP, scatter_dimension=axis, tiled=True),)


_gather_axis.defvjp(_gather_axis_forward, _gather_axis_backward)


def _partition_specs(params: dict[str, Any], mesh: Mesh) -> Any:
    return jax.tree.map(lambda leaf: leaf.spec, sharding.tree_shardings(params, mesh))
