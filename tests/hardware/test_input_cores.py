"""Cores of a host for the input: the measured rates, and the division by hosts."""

import math
import types

from diht_jax.hardware.chips import GIB, find_chip
from diht_jax.hardware.report import describe_input, num_hosts
from diht_jax.hardware.topologies import Topology


def gpus(*shape):
    devices = (types.SimpleNamespace(device_kind="NVIDIA H100"),) * math.prod(shape)
    return Topology("h100", find_chip("h100"), shape, devices, 60 * GIB)


def test_eight_gpus_that_take_55_000_images_need_39_to_68_cores():
    lines = describe_input(gpus(8), 55_000)
    # 55,000 / 1,438.9 = 38.2; / 980.2 = 56.1; / 810.4 = 67.9
    assert "39 (384 px), 57 (512 px), 68 (256 to 1024 px)" in "\n".join(lines)
    assert any("55,000" in line for line in lines)


def test_hosts_of_a_slice_are_those_of_its_devices():
    devices = tuple(types.SimpleNamespace(process_index=i // 4) for i in range(256))
    assert num_hosts(Topology("v5e:16x16", find_chip("v5e"), (16, 16), devices, 16 * GIB)) == 64
