"""How the form of the loss is chosen: by the devices of the mesh, the batch and the memory."""

import numpy as np
import pytest
from jax.sharding import Mesh

from diht_jax.losses.dense import choose_impl


def mesh_of(device_kind, data, fsdp):
    """What is looked at of a mesh, of devices that are not here."""
    device = type("Device", (), {"device_kind": device_kind})()
    return Mesh(np.full((data, fsdp), device, object), ("data", "fsdp"))


def choose(kind, data, fsdp, num_pairs, width=768):
    return choose_impl(mesh_of(kind, data, fsdp), ("data", "fsdp"), num_pairs, width)


@pytest.mark.parametrize(
    "kind, data, fsdp, num_pairs, impl",
    [
        ("NVIDIA H100", 512, 1, 65_536, "gathered"),  # 23 ms of latency for 0.8 ms of products
        ("NVIDIA H100", 64, 8, 65_536, "streaming"),  # 3 ms, gathered 8.4
        ("NVIDIA H100", 64, 8, 1_048_576, "streaming"),  # 2,048 examples each: products hide it
        ("TPU v5 lite", 32, 8, 8_192, "gathered"),  # 0.17 ms for 0.05 ms, gathered 0.12 ms
        ("cpu", 8, 1, 256, "streaming"),
    ],
)
def test_the_choice(kind, data, fsdp, num_pairs, impl):
    assert choose(kind, data, fsdp, num_pairs).impl == impl


def test_what_does_not_fit_is_not_gathered():
    """Many slow devices: 8,192 transfers of 22 us would ask for it, 18 GB of arrays forbid it."""
    choice = choose("NVIDIA H100", 4096, 1, 1_048_576, width=1024)
    assert choice.impl == "streaming" and "it needs 18.25 GB, of 4.29 GB" in choice.reason
