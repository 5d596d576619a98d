"""Metrics files: resumed runs have one line per step, and half-written lines do no harm.

Also the wall time by use, with an injected clock.
"""

import functools
import json

import jax
import pytest
from tensorboard.compat.proto import event_pb2

from diht_jax.records.shard_files import read_records
from diht_jax.training import loop
from diht_jax.training.monitoring.anomalies import AnomalyMonitor
from diht_jax.training.monitoring.metrics import (
    USES,
    WALL_TIME_FILE,
    MetricWriter,
    WallTime,
    plot_curves,
    read_metrics,
)
from tests import make
from tests.records.stores import BucketStore
from tests.training.monitoring.test_throughput import Machine


def event_files(bucket, folder):
    """Returns the events of a run in a bucket, per file, in TensorBoard's reading order."""
    files = []
    for path in sorted(BucketStore().find(f"{bucket}/run/tensorboard")):
        copy = folder / path.rsplit("/", 1)[1]
        copy.write_bytes(BucketStore().cat_file(path))
        files.append([event_pb2.Event.FromString(event) for event in read_records(copy)])
    return files


def test_a_run_in_a_bucket_can_be_watched(bucket, tmp_path):
    writer = MetricWriter(f"{bucket}/run", 4, make.tiny_config())
    for step in (5, 6):
        writer.write(step, {"loss": step / 2})
        # The writer is open, and a kill could come now.
        assert read_metrics(f"{bucket}/run")[-1] == {"step": step, "loss": step / 2}
        [[version, start, *events]] = event_files(bucket, tmp_path)
        assert (version.file_version, start.step) == ("brain.Event:2", 5)
        assert start.session_log.status == event_pb2.SessionLog.START
        values = [(event.step, event.summary.value[0].simple_value) for event in events]
        assert values == [(s, s / 2) for s in range(5, step + 1)]
    writer.close()
    plot_curves(f"{bucket}/run")
    assert BucketStore().exists(f"{bucket}/run/curves.png")


def test_a_bucket_that_fails_for_a_while_costs_no_line(bucket, tmp_path, caplog):
    writer = MetricWriter(f"{bucket}/run", 0, make.tiny_config())
    for step in range(1, 5):
        # Each step writes one object of lines and one of events.
        BucketStore.failures = 2 if step in (2, 4) else 0
        writer.write(step, {"loss": step / 2})
        assert read_metrics(f"{bucket}/run")[-1]["step"] == (step if step in (1, 3) else step - 1)
    assert caplog.text.count("kept for later, it cannot be written: 503 backend error") == 4
    writer.sync()
    assert [row["step"] for row in read_metrics(f"{bucket}/run")] == [1, 2, 3, 4]
    writer.close()
    [events] = event_files(bucket, tmp_path)
    assert [event.step for event in events[2:]] == [1, 2, 3, 4]
    BucketStore.failures = 1
    plot_curves(f"{bucket}/run")
    assert "curves.png cannot be written: 503 backend error" in caplog.text


def test_lines_that_are_no_rows_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n[2]\n\xff\xfe\n{"loss": 3}\n{"step": 4}\n'
    )
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 4}]


class Clock:
    """A clock that only `spend` advances."""

    def __init__(self):
        self.secs = 1000.0

    def __call__(self):
        return self.secs

    def spend(self, secs):
        self.secs += secs


@pytest.mark.parametrize("losses", [(2.0, 3.4, 3.6), (-4.0, -3.9, -4.5, -3.9)])
def test_a_loss_far_above_the_lowest_one_is_a_spike_also_below_0(losses, caplog):
    monitor = AnomalyMonitor(make.tiny_config(), str)
    for step, loss in enumerate(losses, start=1):
        monitor.check_window(step, {"loss": loss, "logit_scale": 10.0})
    spike = f"step {len(losses)}: loss {losses[-1]:g}, while it has been down to {min(losses):g}"
    assert [record.getMessage() for record in caplog.records] == [spike]


def secs(scalars):
    return {use: scalars[f"wall_secs/{use}"] for use in USES if scalars[f"wall_secs/{use}"]}


def start(folder, clock, start_step, *, opening, compiling):
    """Simulates a process from its start to its first step."""
    began = clock()
    clock.spend(opening)
    wall_time = WallTime(folder, start_step, began=began, clock=clock)
    with wall_time.during("compile"):
        clock.spend(compiling)
    wall_time.switch("step")
    return wall_time, MetricWriter(folder, start_step, make.tiny_config())


def train_steps(wall_time, writer, clock, steps, step_secs=1.0):
    """Simulates steps that wait for a batch and write a line each, and a save after step 4."""
    for step in steps:
        with wall_time.during("input"):
            clock.spend(0.5)
        clock.spend(step_secs)
        wall_time.save()
        writer.write(step, wall_time.scalars())
        if step == 4:
            with wall_time.during("checkpoint"):
                clock.spend(2.0)


def test_steps_made_again_and_start_up_are_lost_however_often_a_run_is_killed(tmp_path):
    clock = Clock()
    first, writer = start(tmp_path, clock, 0, opening=20.0, compiling=30.0)
    train_steps(first, writer, clock, range(1, 8))
    # Killed after step 7 with the state of step 4. The next start is killed before its first step;
    # the time up to its last write of the file is known.
    clock.spend(500.0)  # no process runs
    start(tmp_path, clock, 4, opening=15.0, compiling=7.0)
    clock.spend(500.0)
    third, writer = start(tmp_path, clock, 4, opening=15.0, compiling=5.0)
    train_steps(third, writer, clock, range(5, 11), step_secs=2.0)
    assert secs(read_metrics(tmp_path)[-1]) == {
        "start": 20.0,
        "compile": 30.0,
        "step": 4 * 1.0 + 6 * 2.0,
        "input": 10 * 0.5,
        "checkpoint": 2.0,
        "lost": 3 * 1.5 + 15.0 + 15.0 + 5.0,
    }
    assert json.loads((tmp_path / WALL_TIME_FILE).read_text())["starts"] == 3


def test_a_damaged_file_is_replaced_by_the_last_line(tmp_path, caplog):
    clock = Clock()
    first, writer = start(tmp_path, clock, 0, opening=1.0, compiling=1.0)
    train_steps(first, writer, clock, range(1, 5))
    (tmp_path / WALL_TIME_FILE).write_bytes(
        (tmp_path / WALL_TIME_FILE).read_bytes().replace(b"4.0", b"9.0")
    )
    again, _ = start(tmp_path, clock, 4, opening=1.0, compiling=1.0)
    found = secs(again.scalars())
    assert (found["step"], found["lost"]) == (4.0, 2.0)
    assert WALL_TIME_FILE in caplog.text


def test_a_file_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / WALL_TIME_FILE).mkdir()
    WallTime(tmp_path, 0, clock=Clock()).close()
    assert WALL_TIME_FILE in caplog.text


@pytest.mark.parametrize(("batch_secs", "idle_secs"), [(1.5, 0.0), (2.5, 0.5), (6.0, 4.0)])
def test_a_wait_next_to_a_running_step_is_the_steps(tmp_path, batch_secs, idle_secs):
    """The simulated device takes two seconds per step."""
    machine = Machine()
    wall_time = WallTime(tmp_path, 0, clock=machine.clock)
    wall_time.switch("step")
    rate = machine.rate(
        batch_secs, num_steps=100, num_windows=1, during=lambda: wall_time.during("input")
    )
    wall_time.count_hidden(rate.hidden_secs)
    found = secs(wall_time.scalars())
    assert found["input"] / 100 == pytest.approx(idle_secs, abs=0.05)
    assert found["step"] / 100 == pytest.approx(2.0, abs=0.05)


def slow_down(monkeypatch, clock, owner, name, cost):
    function = getattr(owner, name)

    def slow(*args, **kwargs):
        clock.spend(cost)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, slow)


def test_a_run_that_is_stopped_and_goes_on_accounts_for_all_of_its_time(
    config, tmp_path, monkeypatch
):
    clock = Clock()
    monkeypatch.setattr(loop, "WallTime", functools.partial(WallTime, clock=clock))
    slow_down(monkeypatch, clock, loop.Checkpointer, "save", 3.0)
    slow_down(monkeypatch, clock, loop.Run, "start_phase", 11.0)
    slow_down(monkeypatch, clock, loop.Run, "run_step", 1.0)
    slow_down(monkeypatch, clock, loop.Run, "first_state", 5.0)
    for stop in (2, None):
        loop.train(
            config, tmp_path, stop_after_steps=stop, devices=jax.devices()[:1], began=clock()
        )
    totals = json.loads((tmp_path / WALL_TIME_FILE).read_text())
    assert {use: s for use, s in totals["secs"].items() if s} == {
        "start": 5.0,
        "compile": 11.0,
        "step": 6.0,
        "checkpoint": 3 * 3.0,
        "lost": 5.0 + 11.0,
    }
    assert totals["starts"] == 2 and sum(totals["secs"].values()) == clock() - 1000.0
