"""Device mesh, partition rules, and all-gathering of sharded parameters.

Axis names are `data` (replicas) and `fsdp` (parameters and optimiser state are sharded over it);
batches are sharded over both.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

FSDP = "fsdp"
BATCH_AXES = ("data", FSDP)

# Parameters that are gathered block by block, and those that are gathered in the dtype that they
# are stored in (see `models.dual_encoder`, which is a layer above).
_OF_BLOCK = re.compile(r"(vision|text)/blocks/")
_NOT_CAST = ("token_embedding", "positional_embedding")

# The first matching pattern decides. The path of an optimiser moment contains that of its
# parameter, so the same rules apply. Matrices are sharded along their larger side if CLIP's shapes
# allow it; vectors and scalars are too small for sharding.
PARTITION_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"token_embedding/embedding$", PartitionSpec(FSDP, None)),
    (r"patch_embedding/kernel$", PartitionSpec(None, None, None, FSDP)),
    (r"(in_proj|[qkv]_proj|fc_in)/kernel$", PartitionSpec(None, FSDP)),
    (r"concept_heads/\w+/kernel$", PartitionSpec(None, FSDP)),
    (r"(out_proj|fc_out|projection)/kernel$", PartitionSpec(FSDP, None)),
    (r"^record_means/", PartitionSpec(BATCH_AXES)),
)


def create_mesh(data: int, fsdp: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Creates a mesh with axes (`data`, `fsdp`).

    Args:
        data: devices along `data`; -1 is the number of devices divided by `fsdp`.
        fsdp: devices along `fsdp`; -1 is the number of devices divided by `data`.
        devices: the devices to use; all devices of the job by default.

    Raises:
        ValueError: the product of the axes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if min(data, fsdp) < -1 or 0 in (data, fsdp) or data == fsdp == -1:
        sizes = {"data": data, "fsdp": fsdp}
        raise ValueError(f"config.mesh: expected positive sizes and at most one -1, got {sizes}")
    if data == -1:
        data = len(devices) // fsdp
    elif fsdp == -1:
        fsdp = len(devices) // data
    if data * fsdp != len(devices):
        sizes = {"data": data, "fsdp": fsdp}
        raise ValueError(
            f"config.mesh: {sizes} makes {data * fsdp} devices, but there are "
            f"{len(devices)}; config.mesh.data=-1 with config.mesh.fsdp=1 fits any number"
        )
    return Mesh(arrange_devices(devices, data, fsdp), BATCH_AXES)


def arrange_devices(devices: Sequence[jax.Device], data: int, fsdp: int) -> np.ndarray:
    """Arranges devices for a mesh, with each group along `fsdp` on the fastest links.

    A group is inside a TPU slice or a GPU host if its size allows it. In a slice it fills a block
    of the torus, and physical axes are split if necessary.

    Args:
        devices: `data` times `fsdp` devices, in any order.
        data: size of the axis `data`.
        fsdp: size of the axis `fsdp`.

    Returns:
        Devices [data, fsdp].
    """
    if devices[0].platform not in ("tpu", "gpu", "cuda", "rocm"):
        return np.asarray(devices).reshape(data, fsdp)
    islands = _fast_islands(devices)
    size = len(islands[0])
    if any(len(island) != size for island in islands) or size % fsdp:
        if len(islands) > 1 and fsdp > 1:
            logging.warning(
                "config.mesh.fsdp=%d does not divide the %d devices of a slice or host, so that "
                "parameters are gathered over the network between them",
                fsdp,
                size,
            )
        return np.asarray([d for island in islands for d in island]).reshape(data, fsdp)
    shape = (size // fsdp, fsdp)
    return np.concatenate(
        [
            mesh_utils.create_device_mesh(shape, island, allow_split_physical_axes=True)
            if _is_cuboid(island)
            else np.asarray(island).reshape(shape)
            for island in islands
        ]
    )


def _fast_islands(devices: Sequence[jax.Device]) -> list[list[jax.Device]]:
    """Groups devices by slice (TPU) or by host (GPU), in order.

    JAX numbers GPU hosts as slices, for any number of processes per host. If it does not, each
    process counts as a host. In a described topology all hosts are one slice, but devices of the
    same host are adjacent.
    """

    def island(device: jax.Device) -> int:
        index = getattr(device, "slice_index", None)
        if index is not None:
            return index
        return 0 if device.platform == "tpu" else device.process_index

    ordered = sorted(devices, key=lambda device: (island(device), device.id))
    return [list(group) for _, group in itertools.groupby(ordered, key=island)]


def _is_cuboid(devices: Sequence[jax.Device]) -> bool:
    """Returns whether TPU devices form a block of the torus, which JAX can map to a mesh."""
    if devices[0].platform != "tpu":
        return False
    coordinates = np.array([(*device.coords, device.core_on_chip) for device in devices])
    sides = np.ptp(coordinates, axis=0) + 1
    return len(devices) == math.prod(sides) and len(np.unique(coordinates, axis=0)) == len(devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits the first axis of an array over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding with a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Returns the partition of the array at `path` by `PARTITION_RULES`.

    An array axis is not sharded if the size of the mesh axis does not divide it.
    """
    for pattern, spec in PARTITION_RULES:
        if re.search(pattern, path):
            names: list[str | tuple[str, ...] | None] = []
            for name, size in zip(spec, shape, strict=True):
                axes = (name,) if isinstance(name, str) else name or ()
                num_parts = math.prod(map(mesh.shape.get, axes))
                names.append(name if size % num_parts == 0 else None)
            return PartitionSpec(*names)
    return PartitionSpec()


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a `NamedSharding` for each leaf of `tree` (arrays or shape structs), by the rules."""

    def sharding_of(path, leaf):
        name = path_name(path)
        return NamedSharding(mesh, partition_spec(name, np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def path_name(path: Sequence[Any]) -> str:
    """Formats a JAX key path as `a/b/c`."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


class ParameterGather:
    """All-gathers sharded parameters before their use, inside `jax.shard_map`.

    Parameters are cast to the dtype of the computation before they are sent. Gradients are
    reduce-scattered in the dtype of the parameter.
    """

    def __init__(self, params: dict[str, Any], mesh: Mesh, dtype: DTypeLike):
        """Determines the sharded axis of each parameter."""
        self._dtype = dtype
        is_split = mesh.shape[FSDP] > 1
        self._axes = {
            path_name(path): split.spec.index(FSDP) if FSDP in split.spec and is_split else None
            for path, split in jax.tree_util.tree_leaves_with_path(tree_shardings(params, mesh))
        }

    def block(self, tower: str) -> Callable[[dict[str, Any]], dict[str, Any]] | None:
        """Returns a function that gathers one block of a tower; None if blocks are not sharded."""
        prefix = f"{tower}/blocks/0/"
        if all(axis is None for name, axis in self._axes.items() if name.startswith(prefix)):
            return None
        return functools.partial(self, prefix=prefix)

    def __call__(self, params: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        """Gathers all parameters outside of the towers' blocks; those of blocks remain sharded.

        With the `prefix` of a block, such as "vision/blocks/0/", gathers the parameters of a block.
        """

        def gather(path, shard):
            name = prefix + path_name(path)
            if not prefix and _OF_BLOCK.match(name):
                return shard
            axis = self._axes[name]
            if axis is None:
                return shard
            dtype = shard.dtype if any(part in name for part in _NOT_CAST) else self._dtype
            return _gather_axis(shard, axis, jnp.dtype(dtype))

        return jax.tree_util.tree_map_with_path(gather, params)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_axis(shard: jax.Array, axis: int, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.all_gather(shard.astype(dtype), FSDP, axis=axis, tiled=True)


def _gather_axis_forward(shard, axis, dtype):
    # The empty array carries the dtype of the parameter to the backward pass.
    return _gather_axis(shard, axis, dtype), jnp.zeros((0,), shard.dtype)


def _gather_axis_backward(axis, dtype, kept, cotangent):
    cotangent = cotangent.astype(kept.dtype)
    return (jax.lax.psum_scatter(cotangent, FSDP, scatter_dimension=axis, tiled=True),)


_gather_axis.defvjp(_gather_axis_forward, _gather_axis_backward)
