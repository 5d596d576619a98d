"""The comparison of input and step: what is measured, when it is reported, and what it names."""

import numpy as np
import pytest
from absl import logging

from diht_jax.config import default_config
from diht_jax.input import workers
from diht_jax.training.monitoring.throughput import (
    InputRate,
    InputSupply,
    ThroughputWindow,
    advise,
)

STEP_SECS = 2.0
SHORT = InputRate(100.0, 400.0, True)
FINE = InputRate(400.0, None, False)


class Machine:
    """Devices whose steps take two seconds each, a host that works ahead of them, and the time."""

    device_kind = "CPU"

    def __init__(self, overhead_secs=0.0):
        self.secs = self.free_at = 0.0
        self.overhead_secs = overhead_secs
        self.devices = np.array([self])
        self.size = 1

    def clock(self):
        return self.secs

    def step(self):
        self.free_at = max(self.secs, self.free_at) + STEP_SECS
        self.secs += self.overhead_secs
        return {"loss": Running(self, self.free_at)}

    def run(self, batch_secs, num_steps=20):
        """The rate of the second window of a run whose input makes a batch in so many seconds."""
        window = ThroughputWindow(100, 1, self, self.clock)
        made, before = 0.0, None
        for _ in range(2):
            for _ in range(num_steps):
                made += batch_secs

                def take(made=made):
                    self.secs = max(self.secs, made)

                window.timed(take)
                window.add(self.step())
                if before is not None:
                    before.block_until_ready()  # as the loop does, for the step before
                before = window._last["loss"]
            window.summary()
        return window.input_rate


class Running:
    """A metric of a step that ends at some time."""

    def __init__(self, machine, ready_at):
        self._machine = machine
        self._ready_at = ready_at

    def is_ready(self):
        return self._machine.secs >= self._ready_at

    def block_until_ready(self):
        self._machine.secs = max(self._machine.secs, self._ready_at)
        return self

    def __array__(self, dtype=None, copy=None):
        return np.float32(1.0)


@pytest.fixture(autouse=True)
def single_values(monkeypatch):
    monkeypatch.setattr("diht_jax.training.monitoring.throughput.mean_scalars", lambda measured: {})


def test_a_slow_input_is_measured_beside_what_the_step_could_take():
    # Nearly all of the host's time is spent waiting, but the devices idle for a fifth only.
    rate = Machine().run(batch_secs=2.5)
    assert rate.is_short
    assert rate.supplied == pytest.approx(40.0, rel=0.05)
    assert rate.possible == pytest.approx(50.0)


@pytest.mark.parametrize("batch_secs, overhead_secs", [(0.5, 0.0), (1.9, 0.0), (0.5, 3.0)])
def test_an_input_that_keeps_up_is_not_short(batch_secs, overhead_secs):
    """Also where the devices wait for the host itself."""
    assert not Machine(overhead_secs).run(batch_secs).is_short


@pytest.fixture
def reported(monkeypatch):
    said = []
    for level in ("info", "warning"):
        monkeypatch.setattr(logging, level, lambda text, *args: said.append(text % args))
    monkeypatch.setattr(workers, "usable_cores", lambda: 4)
    return said


def test_a_warning_comes_once_in_a_while(reported):
    secs = [0.0]
    supply = InputSupply(default_config().data, clock=lambda: secs[0], worker_secs=lambda: secs[0])
    times = []
    for secs[0] in range(10, 2000, 10):
        supply.check(SHORT)
        if len(reported) > len(times):
            times.append(secs[0])
    assert times == [60, 660, 1260, 1860]
    assert reported[0].startswith("the input gives 100 images/s, and the step could take 400; ")
    secs[0] = 2000.0
    supply.check(FINE)
    assert len(reported) == 4  # within the time of the last warning
    for secs[0] in (2600.0, 2700.0):
        supply.check(FINE)
    assert reported[4:] == ["the input keeps up with the step: 400 images/s"]


def test_advice_names_the_setting_to_change():
    data = default_config().data

    def advice(busy_cores, **changes):
        changed = data.copy_and_resolve_references()
        changed.update(changes)
        return advise(changed, cores=8, busy_cores=busy_cores)

    assert "raise config.data.num_workers: 3 workers, and this" in advice(3.0, num_workers=3)
    assert "0 workers (it decodes in threads), and" in advice(0.0, num_workers=0)
    assert "--cpus-per-task" in advice(8.0, num_workers=8)
    assert "config.data.fast_decode=True" in advice(8.0, num_workers=8, fast_decode=False)
    waiting = advice(1.0, num_workers=8)
    assert "keep 1.0 of 8 cores busy and wait for storage" in waiting
    for key in ("order='blocks'", "read_threads=32", "cache_dir"):
        assert f"config.data.{key}" in waiting
