"""Model FLOPs against a manual count; speed of steps and input on a simulated device."""

import contextlib

import jax
import numpy as np
import pytest

from diht_jax.training.monitoring.throughput import (
    ThroughputWindow,
    mesh_peak_flops,
    model_flops,
)

STEP_SECS = 2.0


def tower_flops(tokens, width, layers):
    """Forward matrix FLOPs of one example: projections, MLP and attention of every block.

    The last block computes keys and values of all tokens, and everything else for one token.
    """
    block = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    last = 2 * (2 * tokens + 10) * width**2 + 2 * 2 * tokens * width
    return (layers - 1) * block + last


@pytest.mark.parametrize("scan_layers", [False, True])
def test_model_flops_are_three_times_the_forward_pass(config, scan_layers):
    """A scan computes all tokens of the last block, although only one is read."""
    config.model.scan_layers = scan_layers
    config.model.patch_dropout = 0.0
    config.model.overrides.update(vision_layers=2, text_layers=3)
    batch, width, d = 16, 32, 16
    vision = tower_flops(17, width, 2) + 2 * width * d
    patches = 2 * 16 * (4 * 4 * 3) * width
    text = tower_flops(24, width, 3) + 2 * width * d
    # The gradient of the patch kernel is needed, that of the pixels is not.
    expected = batch * (3 * (vision + text) + 2 * patches)
    # In addition to the towers there is the loss, a few percent at this size.
    assert expected < model_flops(config, jax.devices()) < 1.1 * expected

    config.optimizer.frozen = ("^vision/",)
    locked = batch * (vision + patches + 3 * text)
    assert locked < model_flops(config, jax.devices()) < 1.1 * locked


class Machine:
    """A simulated mesh with steps of two seconds, an asynchronous host, and the clock."""

    size = 4

    def __init__(self, overhead_secs=0.0, device_kind="TPU v4"):
        self.secs = self.free_at = 1000.0
        self.overhead_secs, self.device_kind = overhead_secs, device_kind
        self.devices = np.array([self])

    def clock(self):
        return self.secs

    def wait(self, until, result=None):
        self.secs = max(self.secs, until)
        return result

    def step(self, loss=1.0):
        self.free_at = max(self.secs, self.free_at) + STEP_SECS
        self.secs += self.overhead_secs
        return {"loss": Running(self, self.free_at, loss)}

    def rate(self, batch_secs, num_steps=20, num_windows=2, during=contextlib.nullcontext):
        """Returns the input rate of the last window, if the input takes `batch_secs` per batch."""
        window = ThroughputWindow(100, 1, self, self.clock)
        made, before = self.secs, None

        def take():
            with during():
                self.wait(made)

        for _ in range(num_windows):
            for _ in range(num_steps):
                made += batch_secs
                window.timed(take)
                metrics = self.step()
                window.add(metrics)
                if before is not None:
                    before.block_until_ready()  # as the loop does, for the previous step
                before = metrics["loss"]
            window.summary()
        return window.input_rate


class Running:
    """A step's metric, which is ready at a given time."""

    def __init__(self, machine, ready_at, value):
        self._machine, self._ready_at, self._value = machine, ready_at, value

    def is_ready(self):
        return self._machine.secs >= self._ready_at

    def block_until_ready(self):
        self._machine.wait(self._ready_at)
        return self

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.block_until_ready()._value, np.float32)


def test_window_gives_rates_shares_and_mfu():
    machine = Machine()
    assert mesh_peak_flops(machine) == 4 * 275e12
    assert mesh_peak_flops(Machine(device_kind="CPU")) is None
    window = ThroughputWindow(10, 11 * 10**9, machine, machine.clock)
    for loss in (1.0, 3.0):
        assert window.timed(lambda: machine.wait(machine.secs + 0.5, "batch")) == "batch"
        window.add(machine.step(loss))
    # The second step waits for the first; of their 4.5 s, the host waited for data for 1 s.
    assert window.excluded(lambda: machine.wait(machine.secs + 100.0, "done")) == "done"
    scalars = window.summary()
    assert scalars == {
        "loss": 2.0,
        "images_per_sec": pytest.approx(20 / 4.5),
        "data_wait_secs": 1.0,
        "data_wait_share": pytest.approx(1 / 4.5),
        "model_flops_per_sec": pytest.approx(22e9 / 4.5),
        "mfu": pytest.approx(22e9 / 4.5 / 1.1e15),
    }
    # The next window starts from zero.
    window.add(machine.step(5.0))
    scalars = window.summary()
    assert (scalars["loss"], scalars["images_per_sec"], scalars["data_wait_secs"]) == (5, 5, 0)


def test_a_slow_input_is_measured_next_to_what_the_step_could_take():
    # The host spends nearly all of its time waiting, but the devices idle for only a fifth.
    rate = Machine().rate(batch_secs=2.5)
    assert rate.is_short
    assert rate.supplied == pytest.approx(40.0, rel=0.05)
    assert rate.possible == pytest.approx(50.0)
    assert not Machine().rate(batch_secs=1.9).is_short
    # The devices wait for the host itself.
    assert not Machine(overhead_secs=3.0).rate(batch_secs=0.5).is_short
