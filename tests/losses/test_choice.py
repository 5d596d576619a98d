"""How the form of the loss is chosen: by the devices of the mesh, the batch and the memory."""

import functools
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from diht_jax.losses import contrastive_loss, contrastive_objective
from diht_jax.losses.choice import choose_impl


def mesh_of(device_kind, data, fsdp):
    """What is looked at of a mesh, of devices that are not here."""
    device = types.SimpleNamespace(device_kind=device_kind)
    devices = np.full((data, fsdp), device, object)
    return types.SimpleNamespace(devices=devices, shape={"data": data, "fsdp": fsdp})


def choose(kind, data, fsdp, num_pairs, width=768):
    return choose_impl(mesh_of(kind, data, fsdp), ("data", "fsdp"), num_pairs, width)


@pytest.mark.parametrize(
    "kind, data, fsdp, num_pairs, impl",
    [
        ("NVIDIA H100", 512, 1, 65_536, "gathered"),  # 23 ms of latency for 0.8 ms of products
        ("NVIDIA H100", 64, 8, 65_536, "streaming"),  # 3 ms, gathered 8.4
        ("NVIDIA H100", 1, 8, 65_536, "streaming"),  # 0.2 ms for 49 ms
        ("NVIDIA H100", 64, 8, 1_048_576, "streaming"),  # 2,048 examples each: products hide it
        ("TPU v5 lite", 32, 8, 65_536, "streaming"),  # 0.6 ms for 3.1 ms
        ("TPU v5 lite", 32, 8, 8_192, "gathered"),  # 0.17 ms for 0.05 ms, gathered 0.12 ms
        ("TPU v5 lite", 1, 1, 256, "streaming"),
        ("cpu", 8, 1, 256, "streaming"),
    ],
)
def test_the_choice(kind, data, fsdp, num_pairs, impl):
    assert choose(kind, data, fsdp, num_pairs).impl == impl


def test_what_does_not_fit_is_not_gathered():
    """Many slow devices: 8,192 transfers of 22 us would ask for it, 18 GB of arrays forbid it."""
    choice = choose("NVIDIA H100", 4096, 1, 1_048_576, width=1024)
    assert choice.impl == "streaming" and "it needs 18.25 GB, of 4.29 GB" in choice.reason


def test_the_reason_has_the_numbers():
    reason = choose("NVIDIA H100", 512, 1, 65_536).reason
    # 2 x 512 x 22.4 us; 8 x 128 x 65,536 x 768 at 989 / 15 TFLOP/s.
    assert "1,024 transfers round a ring of 512 devices take at least 22.9 ms (network)" in reason
    assert "its products 0.8 ms" in reason
    # 3 x (8.4 + 448 x 3.4 + 63 x 14) us.
    assert "gathered, the latency is 7.2 ms and the products 1.5 times as many" in reason
    # 4 bytes of 3 [128, N] and 3.5 [N, 768], of 5% of 80 GiB.
    assert "it needs 0.81 GB, of 4.29 GB allowed" in reason


def test_two_levels_count_their_rounds_and_the_collectives_of_a_group():
    # 2 x 64 x 22.4 us, and 4 x (8.4 + 7 x 3.4) us inside the hosts.
    ring = "128 transfers round a ring of 64 groups of 8 take at least 3.0 ms (network)"
    assert ring in choose("NVIDIA H100", 64, 8, 65_536).reason
    # 5 x 128 x 1 us, and 4 x 2 x sqrt(2) / 2 us; four blocks of 0.8 MB would be over the limit.
    ring = "640 transfers round a ring of 128 groups of 2 take at least 0.6 ms (ici)"
    assert ring in choose("TPU v5 lite", 32, 8, 65_536).reason
    # A host that gathers all images has nothing to send round.
    reason = choose("NVIDIA H100", 1, 8, 1_024).reason
    assert "0 transfers round a ring of 1 groups of 8 take at least 0.1 ms (nvlink)" in reason


def test_a_setting_is_the_choice():
    mesh = mesh_of("NVIDIA H100", 64, 8)
    choice = choose_impl(mesh, ("data", "fsdp"), 65_536, 768, "streaming")
    assert choice == ("streaming", "as config.loss.impl has it")


def test_auto_computes_the_same():
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(2, 32, 8))
    arrays = np.float32(rows / np.linalg.norm(rows, axis=2, keepdims=True))
    auto, streaming, gathered = (
        jax.jit(functools.partial(contrastive_objective, mesh=mesh, impl=impl))(*arrays, 10.0)[0]
        for impl in ("auto", "streaming", "gathered")
    )
    assert auto == streaming
    np.testing.assert_allclose(streaming, gathered, rtol=1e-5)
    np.testing.assert_allclose(auto, contrastive_loss(*arrays, 10.0), rtol=1e-5)
    assert contrastive_loss(*arrays, 10.0, impl="auto") == contrastive_loss(*arrays, 10.0)
