"""Runs that are told to stop, and runs whose numbers go wrong."""

import logging
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diht_jax.sharding import create_mesh
from diht_jax.training.alarms import Alarms, DivergedError
from diht_jax.training.checkpoint import restore_model
from diht_jax.training.loop import Run, train
from diht_jax.training.metrics import read_metrics
from diht_jax.training.stopping import EXIT_CODE


def assert_bitwise_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_a_terminated_run_saves_exits_with_75_and_goes_on_bit_identically(squares, tmp_path):
    def start(name):
        command = [
            *(sys.executable, "-m", "diht_jax.train", "--config", "configs/demo.py:debug=True"),
            *(f"--config.data.train={squares}", "--workdir", str(tmp_path / name)),
            *("--config.total_steps=300", "--config.checkpoint.every_steps=1000"),
        ]
        env = {**os.environ, "XLA_FLAGS": ""}
        return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    process = start("stopped")
    deadline = time.monotonic() + 200
    while not read_metrics(tmp_path / "stopped"):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, messages = process.communicate(timeout=100)
    assert process.returncode == EXIT_CODE, messages
    assert "the same command goes on from there" in messages
    (saved,) = (int(p.name) for p in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert 1 <= saved < 300
    mesh = create_mesh(1, 1, jax.devices()[:1])
    finished = []
    for name in ("stopped", "straight"):
        process = start(name)
        _, messages = process.communicate(timeout=200)
        assert process.returncode == 0, messages
        finished.append(restore_model(tmp_path / name, mesh))
    assert [model.step for model in finished] == [300, 300]
    assert_bitwise_equal(*(model.params for model in finished))


def test_an_update_with_numbers_that_are_not_finite_is_skipped(config, tmp_path):
    config.ema.decay = 0.9
    run = Run(config, tmp_path, jax.devices()[:1])
    try:
        step = run.program.step(run.state)
        state, metrics = step(run.state, run.next_batch())
        assert metrics["skipped"] == 0
        params = {**state.params, "log_logit_scale": jnp.float32(np.nan)}
        broken = jax.tree.map(np.asarray, state.replace(params=params))
        after, metrics = step(jax.tree.map(jnp.asarray, broken), run.next_batch())
    finally:
        run.close()
    assert metrics["skipped"] == 1 and np.isnan(metrics["loss"])
    assert int(after.step) == 2
    assert_bitwise_equal(
        (after.params, after.opt_state, after.ema_params),
        (broken.params, broken.opt_state, broken.ema_params),
    )


def test_a_diverged_run_stops_names_its_records_and_keeps_its_checkpoint(config, tmp_path, caplog):
    config.max_skipped_steps = 3
    config.checkpoint.every_steps = 1
    config.optimizer.warmup_steps = 0
    config.optimizer.learning_rate = 1e38  # overflows the parameters in the first step
    with caplog.at_level(logging.WARNING), pytest.raises(DivergedError, match="3 updates in a row"):
        train(config, tmp_path)
    assert caplog.text.count("update skipped") == 3 and "square_0" in caplog.text
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert steps and steps[-1] <= 5


def test_alarms_count_in_a_row_and_in_all(config):
    config.max_skipped_steps = 2
    alarms = Alarms(config, lambda step: [f"record{step}"])
    finite = {"skipped": 0.0, "loss": 1.0, "grad_norm": 1.0}
    bad = {"skipped": 1.0, "loss": np.nan, "grad_norm": np.nan}
    for step, metrics in enumerate((bad, finite, bad, finite), start=1):
        alarms.check_step(step, metrics)
    assert alarms.num_skipped == 2
    alarms.check_step(5, bad)
    with pytest.raises(DivergedError, match="2 updates in a row were skipped, up to step 6"):
        alarms.check_step(6, bad)


def test_spikes_and_a_capped_scale_are_told(config, caplog):
    alarms = Alarms(config, list)
    with caplog.at_level(logging.WARNING):
        for step, (loss, scale) in enumerate([(3.0, 15.0), (2.0, 99.95), (2.5, 100.0)], start=1):
            alarms.check_window(step, {"loss": loss, "logit_scale": scale})
        assert caplog.text.count("logit scale has reached") == 1 and "down to" not in caplog.text
        alarms.check_window(4, {"loss": 3.6, "logit_scale": 50.0})
    assert "step 4: loss 3.6, while it has been down to 2" in caplog.text
