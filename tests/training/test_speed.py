"""Speed: model flops against a count by hand, MFU of a known device, waiting time, profiles."""

import time

import jax
import numpy as np
import pytest

from diht_jax import sharding
from diht_jax.training.monitoring.throughput import Window, mesh_peak_flops, model_flops


def tower_flops(tokens, width, layers):
    """One example's forward matrix work: projections, MLP and attention of every block.

    The last block computes keys and values of all tokens, and everything else of one.
    """
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    last = 2 * (2 * tokens + 10) * width**2 + 2 * 2 * tokens * width
    return (layers - 1) * block + last


def test_model_flops_are_three_times_the_forward_pass(config):
    config.model.patch_dropout = 0.0
    config.model.overrides.update(vision_layers=2, text_layers=3)
    batch, width, d = 16, 32, 16
    vision = tower_flops(17, width, 2) + 2 * width * d
    patches = 2 * 16 * (4 * 4 * 3) * width
    text = tower_flops(24, width, 3) + 2 * width * d
    # The gradient of the patches' kernel is needed, that of the pixels is not.
    expected = batch * (3 * (vision + text) + 2 * patches)
    # Beside the towers there is the loss, a few percent at this size.
    assert expected < model_flops(config, jax.devices()) < 1.1 * expected

    config.optimizer.frozen = ("^vision/",)
    locked = batch * (vision + patches + 3 * text)
    assert locked < model_flops(config, jax.devices()) < 1.1 * locked


class Device:
    device_kind = "TPU v4"


class FourDevices:
    devices = np.array([[Device()] * 4])
    size = 4


def test_window_gives_rates_shares_and_mfu():
    assert mesh_peak_flops(FourDevices()) == 4 * 275e12
    window = Window(batch_size=10, flops_per_step=11 * 10**9, mesh=FourDevices())
    start = time.perf_counter()
    for loss in (1.0, 3.0):
        window.timed(lambda: time.sleep(0.02))
        window.add({"loss": np.float32(loss)})
    window.excluded(lambda: time.sleep(0.2))
    scalars = window.summary()
    elapsed = time.perf_counter() - start - 0.2
    assert scalars["loss"] == 2.0
    assert scalars["images_per_sec"] == pytest.approx(20 / elapsed, rel=0.1)
    assert scalars["data_wait_share"] == pytest.approx(scalars["data_wait_secs"] / elapsed, rel=0.1)
    assert 0.5 < scalars["data_wait_share"] <= 1.0
    assert scalars["model_flops_per_sec"] == pytest.approx(1.1e9 * scalars["images_per_sec"])
    assert scalars["mfu"] == pytest.approx(scalars["model_flops_per_sec"] / 1.1e15)


def test_a_device_without_a_known_peak_has_no_mfu():
    mesh = sharding.create_mesh(8, 1)
    assert mesh_peak_flops(mesh) is None
    window = Window(batch_size=4, flops_per_step=100, mesh=mesh)
    window.add({"loss": np.float32(0)})
    assert "mfu" not in window.summary()
