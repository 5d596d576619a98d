"""Throughput: model FLOPs against a count by hand, MFU of a known device, waiting time."""

import jax
import numpy as np
import pytest

from diht_jax import sharding
from diht_jax.training.monitoring import throughput
from diht_jax.training.monitoring.throughput import ThroughputWindow, mesh_peak_flops, model_flops
from diht_jax.training.program import TrainProgram


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


def test_the_step_itself_is_counted_where_it_computes_nothing_twice(config, monkeypatch):
    config.optimizer.kind = "muon"
    config.captioning.update(weight=1.0, layers=1)
    expected = model_flops(config, jax.devices())
    for setting in ({}, {"model.remat": "full"}, {"captioning.chunk_tokens": 4}):
        config.update_from_flattened_dict(setting)
        program = TrainProgram(config, 10)
        state = program.abstract_state()
        traced = program.step(state).trace(state, program.abstract_batch())
        with monkeypatch.context() as patched:
            if not setting:
                patched.delattr(throughput, "count_flops")
            assert model_flops(config, jax.devices(), traced) == expected


class Device:
    device_kind = "TPU v4"


class FourDevices:
    devices = np.array([[Device()] * 4])
    size = 4


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.secs = 1000.0

    def __call__(self):
        return self.secs

    def advance(self, secs, result=None):
        self.secs += secs
        return result


def test_window_gives_rates_shares_and_mfu():
    assert mesh_peak_flops(FourDevices()) == 4 * 275e12
    clock = Clock()
    window = ThroughputWindow(10, 11 * 10**9, FourDevices(), clock)
    for loss in (1.0, 3.0):
        assert window.timed(lambda: clock.advance(0.5, "batch")) == "batch"
        clock.advance(1.5)
        window.add({"loss": np.float32(loss)})
    assert window.excluded(lambda: clock.advance(100.0, "evaluated")) == "evaluated"
    scalars = window.summary()
    # Two steps of ten images took 4 s, 1 s of it waiting.
    assert scalars == {
        "loss": 2.0,
        "images_per_sec": 5.0,
        "data_wait_secs": 1.0,
        "data_wait_share": 0.25,
        "model_flops_per_sec": 5.5e9,
        "mfu": pytest.approx(5.5e9 / 1.1e15),
    }
    # The next window starts from nothing.
    clock.advance(2.0)
    window.add({"loss": np.float32(5)})
    scalars = window.summary()
    assert (scalars["loss"], scalars["images_per_sec"]) == (5.0, 5.0)
    assert scalars["data_wait_secs"] == scalars["data_wait_share"] == 0.0


def test_a_device_without_a_known_peak_has_no_mfu():
    mesh = sharding.create_mesh(8, 1)
    assert mesh_peak_flops(mesh) is None
    window = ThroughputWindow(batch_size=4, flops_per_step=100, mesh=mesh)
    window.add({"loss": np.float32(0)})
    assert "mfu" not in window.summary()
