"""Locks between processes: on a local disk, and on an S3 server (moto)."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from diht_jax.storage import files, locks
from tests.waiting import wait_until

HOLD = """
import sys, time
from diht_jax.storage.locks import lock_folder
with lock_folder(sys.argv[1], "--workdir", "run.lock"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def time_passes(monkeypatch):
    """Replaces the clock by one that only advances by sleeping, and whose time can be set."""
    now = [1000.0]
    monkeypatch.setattr(locks, "EXPIRY_SECS", 10.0)  # twenty polls of the store
    monkeypatch.setattr(locks, "_now", lambda: now[0])
    monkeypatch.setattr(locks, "_sleep", lambda secs: now.__setitem__(0, now[0] + secs))
    return now


def _leave(folder, **changes):
    """Writes a lock as another process would have left it."""
    holder = {
        "token": "other", "host": "node7", "machine": "another machine", "pid": 12,
        "since": "yesterday", "renewed": 1000.0,
    } | changes  # fmt: skip
    files.write_bytes(files.join(folder, ".leader-0000.json"), json.dumps(holder).encode())


def _lead(folder: str) -> None:
    with locks.leader_lock(folder):
        pass


def test_a_local_holder_is_named_and_leaves_nothing_behind_when_killed(tmp_path, caplog):
    run = str(tmp_path / "run")
    process = subprocess.Popen([sys.executable, "-c", HOLD, run], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(ValueError, match=f"another run works in {run}: process {process.pid} on "),
        locks.lock_folder(run, "--workdir", "run.lock"),
    ):
        pass
    # The process still holds the lock under the name of a leader's lock, for which others wait.
    os.link(tmp_path / "run" / "run.lock", tmp_path / "run" / ".leader.lock")
    with caplog.at_level("WARNING"):
        waiting = threading.Thread(target=_lead, args=(run,))
        waiting.start()
        wait_until(lambda: f"waiting for process {process.pid} on " in caplog.text)
    process.send_signal(signal.SIGKILL)
    process.wait()
    waiting.join()
    for _ in range(2):  # a process that ends leaves nothing behind either
        with locks.lock_folder(run, "--workdir", "run.lock"):
            pass


@pytest.mark.parametrize("renewed", [1000.0, 1e12, -1e12], ids=["right", "ahead", "behind"])
def test_the_lock_of_a_leader_on_another_machine_expires_whatever_its_clock(
    s3_bucket, time_passes, caplog, renewed
):
    folder = f"{s3_bucket}/c"
    _leave(folder, renewed=renewed)
    with caplog.at_level("WARNING"), locks.leader_lock(folder):
        assert locks.EXPIRY_SECS < time_passes[0] - 1000 <= locks.EXPIRY_SECS + 2
        # A process that also saw the old lock expire cannot create this one.
        assert files.list_names(folder) == [".leader-0001.json"]
        assert not locks._create(files.join(folder, ".leader-0001.json"), "another token")
    assert files.list_names(folder) == []
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert folder in line and "process 12 on node7" in line


def test_a_holder_that_renews_its_lock_is_waited_for(s3_bucket, time_passes, monkeypatch):
    folder = f"{s3_bucket}/c"
    _leave(folder)
    # The holder renews its lock at every poll, and ends after five expiry times.
    end_secs = 1000 + 5 * locks.EXPIRY_SECS

    def sleep(secs: float) -> None:
        time_passes[0] += 100 * secs
        _leave(folder, renewed=f"{time_passes[0]}")
        if time_passes[0] > end_secs:
            files.remove(files.join(folder, ".leader-0000.json"))

    monkeypatch.setattr(locks, "_sleep", sleep)
    with locks.leader_lock(folder):
        assert time_passes[0] > end_secs


def test_the_lock_is_renewed_while_it_is_held(s3_bucket, monkeypatch):
    folder = f"{s3_bucket}/c"
    monkeypatch.setattr(locks, "_RENEWAL_SECS", 0.01)
    with locks.leader_lock(folder):
        path = files.join(folder, *files.list_names(folder))
        seen: set[bytes] = set()
        wait_until(lambda: len(seen.add(files.read_bytes(path)) or seen) >= 3)
    assert files.list_names(folder) == []


def test_a_dead_leader_of_this_machine_is_known_at_once(s3_bucket, time_passes):
    folder = f"{s3_bucket}/c"
    # No such process, and this process, which holds no such lock.
    for pid in (2**22 + 1, os.getpid()):
        _leave(folder, machine=locks._machine(), pid=pid)
        with locks.leader_lock(folder):
            assert time_passes[0] == 1000
    _leave(folder, machine=locks._machine(), pid=os.getppid())
    with locks.leader_lock(folder):
        assert time_passes[0] > 1000 + locks.EXPIRY_SECS
