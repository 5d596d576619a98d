"""Commands in subprocesses: their errors, logs, and locks."""

import fcntl
import subprocess
import sys

import pytest

from benchmarks.lab import processes
from benchmarks.lab.processes import locked, run_command


def test_a_failed_command_shows_the_end_of_what_it_printed(tmp_path):
    with pytest.raises(RuntimeError, match="no_such_module --x=1: exit 1\n.*No module named"):
        run_command("no_such_module", "--x=1")
    log = tmp_path / "lab.log"
    log.write_text("of the start before\n")
    with pytest.raises(RuntimeError, match="No module named"):
        run_command("no_such_module", log=log)
    assert "of the start before" in log.read_text() and "No module named" in log.read_text()


def test_a_lock_lasts_as_long_as_a_command_that_was_started_under_it(tmp_path):
    path = tmp_path / "runs" / "cat_seed0.lock"
    with locked(path):
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=processes._held
        )
    # The lock's owner is gone, as after kill -9, but its command still runs.
    with open(path) as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
        child.wait()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert processes._held == []
