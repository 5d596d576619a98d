"""Runs that are killed or told to stop, and runs with non-finite values."""

import functools
import json
import logging
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from diht_jax.input.pipeline import TrainIterator
from diht_jax.train import main
from diht_jax.training.loop import Run, train
from diht_jax.training.monitoring.anomalies import DivergedError, NonFiniteError
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.multihost import (
    EXIT_CODE,
    LASTING_EXIT_CODE,
    Stopped,
    StopRequest,
    begin_job,
    exit_status,
    job_status,
)
from diht_jax.training.program import TrainProgram
from diht_jax.training.workdir.checkpoint import Checkpointer, SaveError
from tests import make
from tests.docs.commands import parse_command
from tests.training import kill_trial
from tests.training.conftest import assert_bitwise_equal, at_step, saved_steps


def test_a_killed_and_a_terminated_run_end_bit_identically(tmp_path):
    records = make.write_records(tmp_path / "records", 64, [32, 32])
    trial = kill_trial.Trial(records, tmp_path, total_steps=24)
    trial.finish("undisturbed")
    steps_kept = list((tmp_path / kill_trial.KEPT_PROGRAMS).glob("*/jit_train_step-*"))
    # A number of lines after the first, so that the moment is independent of the machine's speed.
    process = trial.start("killed", most_lines=8)
    trial.wait_for_line("killed", process, 4)
    assert trial.kill_in("killed", process, 0.07)
    process = trial.start("killed", most_lines=4)
    trial.wait_for_line("killed", process)
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=900)
    assert process.returncode == EXIT_CODE, log
    assert "the same command goes on from there" in log
    assert 0 < trial.kills[0].last_step < 24
    trial.finish("killed")
    assert kill_trial.compare(tmp_path / "undisturbed", tmp_path / "killed") == []
    # Later starts do not compile the step again.
    assert len(steps_kept) > 0
    found = (tmp_path / kill_trial.KEPT_PROGRAMS).glob("*/jit_train_step-*")
    assert set(found) == set(steps_kept)
    spent = json.loads((tmp_path / "killed" / "wall_time.json").read_text())
    assert spent["starts"] == 3 and spent["secs"]["lost"] > 0


@pytest.mark.parametrize("signals", [1, 2])
def test_one_interrupt_saves_and_a_second_one_aborts(config, tmp_path, monkeypatch, signals):
    device, take, taken = jax.devices()[:1], Run.next_batch, []

    def interrupted(run, stop_request):
        taken.append(take(run, stop_request))
        if len(taken) == 3:
            for _ in range(signals):
                signal.raise_signal(signal.SIGINT)
        return taken[-1]

    monkeypatch.setattr(Run, "next_batch", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped if signals == 1 else KeyboardInterrupt) as raised:
        train(config, tmp_path, devices=device)
    assert signal.getsignal(signal.SIGINT) is before
    saved = saved_steps(tmp_path)
    if signals == 1:
        assert str(raised.value) == "stopped after step 3 of 6" and saved == [3]
    else:
        assert saved == []
    assert int(train(config, tmp_path, devices=device).step) == 6
    assert len(taken) == (6 if signals == 1 else 9)


def test_a_second_sigterm_does_not_disturb_the_last_save(config, tmp_path, monkeypatch):
    close = Checkpointer.close

    def disturbed(checkpointer):
        signal.raise_signal(signal.SIGTERM)
        close(checkpointer)

    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(Checkpointer, "close", disturbed)
    with pytest.raises(Stopped):
        train(config, tmp_path, devices=jax.devices()[:1])
    assert saved_steps(tmp_path) == [1]


def test_the_steps_of_all_stages_are_counted_for_the_stop_of_a_job(monkeypatch):
    """JAX's service stops all processes at the number after the highest that any has passed."""
    given = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", given.append)
    for _ in range(2):
        stage = StopRequest()
        for _ in range(3):
            stage.is_due()
    assert given == list(range(given[0], given[0] + 6))


def test_a_run_whose_input_stalls_saves_and_stops(config, tmp_path, monkeypatch, caplog):
    device, end = jax.devices()[:1], threading.Event()
    undisturbed = train(config, tmp_path / "undisturbed", devices=device)
    waits = {"poll_secs": 0.01, "warn_after_secs": 0.02, "grace_secs": 0.05}
    waiting = functools.partialmethod(TrainIterator.take, **waits)

    def stall():
        signal.raise_signal(signal.SIGTERM)
        end.wait()

    for stalled_step, saved in ((1, []), (4, [3])):
        with monkeypatch.context() as patched:
            at_step(patched, stalled_step, stall)
            patched.setattr(TrainIterator, "take", waiting)
            with pytest.raises(Stopped, match=f"after step {stalled_step - 1} of 6, while its in"):
                train(config, tmp_path / "stalled", devices=device)
        first = 16 * (stalled_step - 1)
        assert f"waiting for examples {first} to {first + 15} of the run's order, in" in caplog.text
        assert saved_steps(tmp_path / "stalled") == saved
    end.set()
    assert_bitwise_equal(train(config, tmp_path / "stalled", devices=device), undisturbed)
    assert [row["step"] for row in read_metrics(tmp_path / "stalled")] == [1, 2, 3, 4, 5, 6]


def raised_from(cause, error, *, is_hidden=False):
    """Returns the error as raised from another one or, if hidden, with `from None`."""
    error.__context__, error.__cause__ = cause, None if is_hidden else cause
    return error


@pytest.mark.parametrize(
    "error, status",
    [
        (ValueError("config.seed=-1"), LASTING_EXIT_CODE),
        (raised_from(OSError("reset"), ValueError("path"), is_hidden=True), LASTING_EXIT_CODE),
        (raised_from(PermissionError("/run"), ValueError("--workdir")), LASTING_EXIT_CODE),
        (SaveError("no room"), 1),
        (raised_from(ConnectionError("reset"), ValueError("gs:// cannot be read")), 1),
    ],
)
def test_errors_that_no_repetition_mends_have_a_status_of_their_own(error, status):
    assert exit_status(error) == status


@pytest.mark.parametrize(
    "text, failing_call, status",
    [
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes", 1, 78),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes", 4, 1),
        ("INTERNAL: connection closed by peer", 1, 1),
    ],
)
def test_a_first_step_that_does_not_fit_is_not_tried_again(
    config, tmp_path, monkeypatch, text, failing_call, status
):
    step, calls = Run.run_step, []

    def failing(run, *arguments):
        calls.append(None)
        if len(calls) == failing_call:
            raise jax.errors.JaxRuntimeError(text)
        return step(run, *arguments)

    monkeypatch.setattr(Run, "run_step", failing)
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=text) as raised:
        train(config, tmp_path, devices=jax.devices()[:1])
    assert exit_status(raised.value) == status
    assert ("Lower config.micro_batch" in str(raised.value)) == (status == LASTING_EXIT_CODE)


def test_a_state_that_does_not_fit_is_not_tried_again(config, tmp_path, monkeypatch):
    def failing(program):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(TrainProgram, "create_state", failing)
    with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED") as raised:
        train(config, tmp_path, devices=jax.devices()[:1])
    assert exit_status(raised.value) == LASTING_EXIT_CODE


def test_processes_learn_of_each_other_that_the_job_has_ended_for_good(tmp_path):
    lost, workdir = ConnectionError("peer closed"), str(tmp_path / "run")
    assert job_status(lost, workdir) == 1
    assert job_status(ValueError("record '7': no picture"), workdir) == LASTING_EXIT_CODE
    assert job_status(lost, workdir) == LASTING_EXIT_CODE
    begin_job(workdir)
    assert job_status(lost, workdir) == 1


@pytest.mark.parametrize("image", [b"no picture", make.png()[:200]], ids=["junk", "truncated"])
def test_a_picture_that_cannot_be_decoded_is_a_lasting_error(config, tmp_path, image):
    """Pillow's errors are of type `OSError`, like those of a disk that may recover."""
    records = [make.record(number, image=image) for number in range(16)]
    config.data.train = str(make.write_records(tmp_path / "records", records))
    with pytest.raises(ValueError, match=r"record '\d{5}'") as raised:
        train(config, tmp_path / "run", devices=jax.devices()[:1])
    assert exit_status(raised.value) == LASTING_EXIT_CODE


def test_the_command_exits_with_the_status_of_its_error(tmp_path):
    arguments = ["--config=configs/demo.py:debug=True", f"--workdir={tmp_path}"]
    arguments += ["--config.data.train=/data", "--config.checkpoint.keep_last=0"]
    with pytest.raises(ValueError, match="config.checkpoint.keep_last=0") as raised:
        parse_command("diht_jax.train", arguments, lambda _: main())
    assert raised.value.exit_status == LASTING_EXIT_CODE


@pytest.fixture
def run(config, tmp_path):
    config.ema.decay = 0.9
    config.debug_nans = True
    run = Run(config, tmp_path, jax.devices()[:1])
    yield run
    run.close()


def planted(state, path, value):
    """Returns the state with one number of one parameter replaced."""
    *parents, name = path.split("/")
    params = jax.tree.map(lambda leaf: leaf, state.params)
    inner = params
    for parent in parents:
        inner = inner[parent]
    inner[name] = inner[name].ravel().at[-1].set(value).reshape(inner[name].shape)
    return state.replace(params=params)


def test_debug_nans_names_where_the_numbers_go_wrong(run):
    healthy = jax.tree.map(np.asarray, run.state)
    cases = [
        (
            "text/blocks/0/mlp/fc_in/kernel",
            np.nan,
            "step 1: loss or gradients are not finite; the first value that is not finite is the "
            "output of text/blocks/0/mlp/fc_in; parameters that are not finite: "
            "text/blocks/0/mlp/fc_in/kernel. The batch's records: square_0",
        ),
        (
            "vision/blocks/0/attention/in_proj/bias",
            np.inf,
            "is what goes into vision/blocks/0/attention/out_proj; parameters that are not finite: "
            "vision/blocks/0/attention/in_proj/bias. ",
        ),
        # The value is finite, but its result is not.
        ("log_logit_scale", 200.0, "is the loss itself; the embeddings are finite. "),
    ]
    for path, value, message in cases:
        state = jax.tree.map(jnp.asarray, healthy)
        run.state = planted(state, path, value)
        run.iterator.set_state({"next_example": 0})
        with pytest.raises(NonFiniteError) as raised:
            run.loop(1)
        assert message in str(raised.value)


def test_a_diverged_run_stops_and_names_its_records(run, caplog):
    run.config.debug_nans = False
    run.config.max_skipped_steps = 3
    run.config.checkpoint.every_steps = 100
    run.state = planted(run.state, "text/projection/kernel", np.inf)
    before = jax.tree.map(np.asarray, run.state)
    with caplog.at_level(logging.WARNING), pytest.raises(DivergedError, match="3 updates in a row"):
        run.loop(None)
    assert caplog.text.count("update skipped") == 3 and "square_0" in caplog.text
    for name in ("params", "opt_state", "ema_params"):
        assert_bitwise_equal(getattr(run.state, name), getattr(before, name))
    assert run.checkpointer.latest_step is None
