"""Meshes and partition rules for real architectures and optimizer states."""

import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from diht_jax import sharding
from diht_jax.config import default_config
from diht_jax.training.program import TrainProgram


@pytest.mark.parametrize(
    "data, fsdp, expected", [(-1, 1, (8, 1)), (2, -1, (2, 4)), (1, 8, (1, 8)), (4, 2, (4, 2))]
)
def test_mesh_shapes(data, fsdp, expected):
    mesh = sharding.create_mesh(data, fsdp)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == expected


@pytest.mark.parametrize("data, fsdp", [(-1, -1), (0, 8), (3, 2), (-1, 16), (-2, 1)])
def test_wrong_meshes_are_refused(data, fsdp):
    with pytest.raises(ValueError, match="config.mesh"):
        sharding.create_mesh(data, fsdp)


KINDS = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5p",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}
SLICES = [
    ("v4", (2, 2, 1), 1),
    ("v4", (16, 16, 16), 1),
    ("v5e", (16, 16), 2),
    ("v5p", (8, 16, 24), 1),
    ("v6e", (8, 16), 2),
    ("tpu7x", (4, 4, 4), 2),
]


def tpu_slice(family, shape, slice_index=0):
    """Stand-in chips of a TPU slice with coordinates, in JAX's order."""
    shape = (*shape, 1)[:3]
    coordinates = np.ndindex(*shape[::-1])
    first = slice_index * math.prod(shape)
    return [
        types.SimpleNamespace(
            platform="tpu",
            device_kind=KINDS[family],
            coords=position[::-1],
            core_on_chip=0,
            id=first + number,
            process_index=(first + number) // 4,
            slice_index=slice_index,
        )
        for number, position in enumerate(coordinates)
    ]


class StandIn(types.SimpleNamespace):
    """A stand-in device that a mesh accepts."""

    __hash__ = object.__hash__


def gpu_hosts(num_hosts, gpus_per_host, *, processes_per_host=1, described=False):
    devices = []
    for number in range(num_hosts * gpus_per_host):
        host = number // gpus_per_host
        process = number * processes_per_host // gpus_per_host
        fields = {} if described else {"slice_index": host}
        devices.append(
            StandIn(platform="gpu", id=number, process_index=process, device_kind="H100", **fields)
        )
    return devices


def check_groups(devices, fsdp, is_close):
    """Checks that the mesh uses each device once and that groups along `fsdp` are close."""
    groups = sharding.arrange_devices(devices, len(devices) // fsdp, fsdp)
    assert groups.shape == (len(devices) // fsdp, fsdp)
    assert {device.id for device in groups.flat} == {device.id for device in devices}
    assert [group for group in groups if not is_close(list(group))] == []


def fill_a_block(chips):
    """Whether the chips belong to one slice and fill a box of its torus."""
    coordinates = np.array([chip.coords for chip in chips])
    one_slice = len({chip.slice_index for chip in chips}) == 1
    return one_slice and math.prod(np.ptp(coordinates, axis=0) + 1) == len(chips)


@pytest.mark.parametrize("family, shape, num_slices", SLICES)
def test_tpu_groups_fill_blocks_of_a_slice(family, shape, num_slices):
    devices = [chip for i in range(num_slices) for chip in tpu_slice(family, shape, i)]
    for fsdp in (1, 4, 8, 16):
        if math.prod(shape) % fsdp == 0:
            check_groups(devices, fsdp, fill_a_block)


@pytest.mark.parametrize("fsdp", [1, 4, 8])
@pytest.mark.parametrize("options", [{}, {"processes_per_host": 8}, {"described": True}])
@pytest.mark.parametrize("num_hosts", [1, 16])
def test_gpu_groups_stay_inside_a_host(num_hosts, options, fsdp):
    devices = gpu_hosts(num_hosts, 8, **options)
    # A job may list its devices in any order.
    shuffled = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    for listed in (devices, shuffled):
        check_groups(listed, fsdp, lambda group: len({device.id // 8 for device in group}) == 1)


def local_share(tree):
    """Fraction of a tree's bytes on one device."""
    whole = sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
    local = sum(
        np.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
    return local / whole


def test_fsdp_divides_parameters_and_optimizer_state():
    config = default_config()
    config.model.name = "diht_vitl14_336px"
    config.mesh.update(data=1, fsdp=8)
    state = TrainProgram(config, total_steps=10_000).abstract_state()
    # An eighth, plus the small parameters that stay whole.
    assert local_share(state.params) < 0.13
    assert local_share(state.opt_state) < 0.13
    unsplit = sharding.tree_shardings(state.params, sharding.create_mesh(8, 1))
    whole = jax.tree.map(lambda leaf, place: leaf.update(sharding=place), state.params, unsplit)
    assert local_share(whole) == 1.0


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = sharding.create_mesh(1, 8)
    rule = "text/projection/kernel"
    assert sharding.partition_spec(rule, (16, 5), mesh) == PartitionSpec("fsdp", None)
    assert sharding.partition_spec(rule, (12, 5), mesh) == PartitionSpec(None, None)
    assert sharding.partition_spec("text/final_norm/scale", (16,), mesh) == PartitionSpec()
