"""The job engine: failures stay with their task, deaths are reported, and nothing hangs.

Workers import the main module, so each test runs a separate script.
"""

import ast
import collections
import errno
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from data_prep.jobs.engine import run_pending
from data_prep.jobs.failures import KEYS, check_job
from diht_jax.config.keys import build_config
from tests.make import REPOSITORY
from tests.waiting import wait_until

Task = collections.namedtuple("Task", "source")

_LONGEST_SECS = 600  # for one script; a failure means that it hangs

_FRAME = """
import collections, os, pathlib, signal, sys, time
from data_prep.jobs import engine
from data_prep.jobs.failures import KEYS
from diht_jax.config.keys import build_config

folder = pathlib.Path(__file__).parent
Task = collections.namedtuple("Task", "source")
config = build_config(KEYS)
config.num_workers = {num_workers}
{body}
def note(task, report):
    work(task.source, report)
    (folder / f"{{task.source}}.done").touch()

if __name__ == "__main__":
    # A shell's background job, which the tests may be, ignores ^C and hands that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tasks = list(map(Task, range(8)))
    print(engine.run_pending(note, tasks, config, label="test"))
"""


def _start(folder: pathlib.Path, body: str, num_workers: int | None = 2) -> subprocess.Popen:
    script = folder / "script.py"
    script.write_text(_FRAME.format(body=body, num_workers=num_workers))
    return subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(folder: pathlib.Path, body: str, num_workers: int | None = 2) -> tuple[dict, str]:
    """Returns the error of each task (None if it is done), and the text on stderr."""
    process = _start(folder, body, num_workers)
    try:
        output, errors = process.communicate(timeout=_LONGEST_SECS)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    failed = {int(task): error for task, error in ast.literal_eval(output).items()}
    done = {int(path.stem): None for path in folder.glob("*.done")}
    assert sorted([*failed, *done]) == list(range(8))
    return failed | done, errors


def _config(**changes):
    config = build_config(KEYS)
    config.update(num_workers=0, **changes)
    return config


_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE)
_LASTING = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENXIO)
_BAD_CONTENTS = (ValueError("damaged"), OSError("no parquet file"))


@pytest.mark.parametrize("error", [*_PASSING, *_LASTING, *_BAD_CONTENTS], ids=repr)
def test_only_errors_that_can_pass_are_tried_again(error):
    passes, tries = error in _PASSING, []
    if isinstance(error, int):
        error = OSError(error, os.strerror(error))

    def work(task: Task, report) -> None:
        tries.append(task)
        if len(tries) <= 2:
            raise error

    failures = run_pending(work, [Task(7)], _config(), label="t")
    if passes:
        assert (failures, len(tries)) == ({}, 3)
    else:
        assert (getattr(error, "strerror", None) or str(error)) in failures["7"]
        assert len(tries) == 1


def test_a_task_that_takes_too_long_is_stopped_twice_and_holds_nobody_up(tmp_path):
    body = """
vars(os).pop("sched_getaffinity", None)  # as on macOS; there are workers all the same
config.shard_timeout_secs = 4.0
def work(task, report):
    if task == 0:
        (folder / f"stuck-{os.getpid()}").touch()
        time.sleep(600)
"""
    outcomes, errors = _run(tmp_path, body, num_workers=None)
    stopped = "stopped after config.shard_timeout_secs=4 seconds"
    assert outcomes == dict.fromkeys(range(8)) | {0: stopped}
    assert errors.count(f"0: {stopped}; its task will run again") == 1
    assert len(list(tmp_path.glob("stuck-*"))) == 2  # each time in a new worker


def test_a_time_limit_needs_workers():
    with pytest.raises(ValueError, match=r"config.shard_timeout_secs=5 with config.num_workers=0"):
        check_job(_config(shard_timeout_secs=5.0))


def test_failures_and_deaths_are_isolated_in_workers(tmp_path):
    body = """
class Odd(Exception):
    def __init__(self, first, second):  # cannot be unpickled
        super().__init__(f"{first} {second}")

def work(task, report):
    report(10)
    if task == 1:
        raise ValueError("one is not allowed")
    if task == 2:
        os._exit(9)
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out
    if task == 5:
        raise Odd("an odd", "exception")
    if task == 7:
        os._exit(0)
    if task == 6 and not (folder / "six").exists():
        (folder / "six").touch()
        os._exit(1)
"""
    outcomes, errors = _run(tmp_path, body)
    assert {t: outcomes[t] for t in (0, 4, 6)} == dict.fromkeys((0, 4, 6))
    assert outcomes[1] == "one is not allowed"
    for task, end in ((2, "exit code 9"), (3, "signal 9, SIGKILL"), (7, "exit code 0")):
        assert f"died at work ({end}): either memory ran out" in outcomes[task]
        assert "or a library crashed" in outcomes[task]
    assert "Odd: an odd exception" in outcomes[5]
    # Only a task killed from outside, maybe because memory ran out, waits and then runs alone.
    assert errors.count("its task will run again") == 4
    assert re.findall(r"(\d): .* its task will run again, alone", errors) == ["3"]
    # Reports of finished tasks arrive.
    assert "8/8" in errors and int(errors.rpartition(" pairs,")[0].rpartition(", ")[2]) >= 50


def test_workers_that_cannot_import_say_so(tmp_path):
    body = """
if __name__ != "__main__":
    import no_such_module
def work(task, report):
    pass
"""
    process = _start(tmp_path, body)
    output, errors = process.communicate(timeout=_LONGEST_SECS)
    assert process.returncode != 0 and output == ""
    assert "no worker process could start: either a module cannot" in errors
    assert "No module named 'no_such_module'" in errors


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent_and_an_interrupted_one_cleans_up(tmp_path, end):
    body = """
def work(task, report):
    try:
        (folder / f"{os.getpid()}.began").touch()
        time.sleep(600)
    finally:
        (folder / f"{os.getpid()}.ended").touch()
"""
    process = _start(tmp_path, body)
    wait_until(lambda: len(list(tmp_path.glob("*.began"))) >= 2)
    process.send_signal(end)
    _, errors = process.communicate(timeout=_LONGEST_SECS)
    began = {path.stem for path in tmp_path.glob("*.began")}
    wait_until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in began))
    if end == signal.SIGINT:
        assert "KeyboardInterrupt" in errors
        assert {path.stem for path in tmp_path.glob("*.ended")} == began
