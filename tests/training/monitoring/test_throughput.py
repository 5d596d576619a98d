"""Model FLOPs against a count by hand; speed of steps and input on a simulated device."""

import jax
import numpy as np
import pytest
from absl import logging

from diht_jax.config import default_config
from diht_jax.input import workers
from diht_jax.training.monitoring import throughput
from diht_jax.training.monitoring.throughput import (
    InputRate,
    InputSupply,
    ThroughputWindow,
    advise,
    mesh_peak_flops,
    model_flops,
)
from diht_jax.training.program import TrainProgram

STEP_SECS = 2.0


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


class Machine:
    """A mesh whose steps take two seconds each, a host that works ahead of it, and the time."""

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

    def rate(self, batch_secs, num_steps=20):
        """The rate of the second window of a run whose input makes a batch in so many seconds."""
        window = ThroughputWindow(100, 1, self, self.clock)
        made, before = self.secs, None
        for _ in range(2):
            for _ in range(num_steps):
                made += batch_secs
                window.timed(lambda made=made: self.wait(made))
                metrics = self.step()
                window.add(metrics)
                if before is not None:
                    before.block_until_ready()  # as the loop does, for the step before
                before = metrics["loss"]
            window.summary()
        return window.input_rate


class Running:
    """A metric of a step that ends at some time."""

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
    # The second step waits for the first one; of their 4.5 s, the host waited for data in 1 s.
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
    # The next window starts from nothing.
    window.add(machine.step(5.0))
    scalars = window.summary()
    assert (scalars["loss"], scalars["images_per_sec"], scalars["data_wait_secs"]) == (5, 5, 0)


def test_a_slow_input_is_measured_next_to_what_the_step_could_take():
    # Nearly all of the host's time is spent waiting, but the devices idle for a fifth only.
    rate = Machine().rate(batch_secs=2.5)
    assert rate.is_short
    assert rate.supplied == pytest.approx(40.0, rel=0.05)
    assert rate.possible == pytest.approx(50.0)


@pytest.mark.parametrize("batch_secs, overhead_secs", [(0.5, 0.0), (1.9, 0.0), (0.5, 3.0)])
def test_an_input_that_keeps_up_is_not_short(batch_secs, overhead_secs):
    """Also where the devices wait for the host itself."""
    assert not Machine(overhead_secs).rate(batch_secs).is_short


def test_a_warning_comes_once_in_a_while(monkeypatch):
    short, fine = InputRate(100.0, 400.0, True), InputRate(400.0, None, False)
    secs, reported, times = [0.0], [], []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *args: reported.append(text % args))
    monkeypatch.setattr(workers, "usable_cores", lambda: 4)
    supply = InputSupply(default_config().data, clock=lambda: secs[0], worker_secs=lambda: secs[0])
    for secs[0] in range(10, 2000, 10):
        supply.check(short)
        if len(reported) > len(times):
            times.append(secs[0])
    assert times == [60, 660, 1260, 1860]
    assert reported[0].startswith("the input gives 100 images/s, and the step could take 400; ")
    for secs[0] in (2000.0, 2600.0, 2700.0):  # the first is within the time of the last warning
        supply.check(fine)
    assert reported[4:] == ["the input keeps up with the step: 400 images/s"]


def test_advice_names_the_setting_to_change():
    def advice(busy_cores, **changes):
        data = default_config().data
        data.update(changes)
        return advise(data, cores=8, busy_cores=busy_cores)

    assert "raise config.data.num_workers: 3 workers, and this" in advice(3.0, num_workers=3)
    assert "0 workers (it decodes in threads), and" in advice(0.0, num_workers=0)
    assert "--cpus-per-task" in advice(8.0, num_workers=8)
    assert "config.data.fast_decode=True" in advice(8.0, num_workers=8, fast_decode=False)
    waiting = advice(1.0, num_workers=8)
    assert "keep 1.0 of 8 cores busy and wait for storage" in waiting
    assert "config.data.order='blocks'" in waiting
