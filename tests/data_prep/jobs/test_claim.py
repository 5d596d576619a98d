"""One of several processes writes an output: on a local disk and on an S3 server."""

import json
import os
import threading
from concurrent import futures

import pytest

from diht_jax.storage import claim, files


@pytest.fixture(params=["disk", "s3"])
def folder(request, tmp_path):
    return str(tmp_path) if request.param == "disk" else request.getfixturevalue("s3_bucket") + "/c"


def _leave(folder, name=".claim-0000.json", **changes):
    """A claim as another process would have left it."""
    holder = {
        "token": "other", "host": "node7", "machine": "another machine", "pid": 12,
        "since": "yesterday", "renewed": 1000.0, "writing": True,
    } | changes  # fmt: skip
    files.write_bytes(files.join(folder, name), json.dumps(holder).encode())


def test_of_many_at_once_one_holds_it(folder, monkeypatch):
    monkeypatch.setattr(claim, "_POLL_SECS", 0.01)
    inside, most = [], []
    start = threading.Barrier(6)

    def work(number):
        start.wait(timeout=300)
        with claim.take(folder) as own:
            inside.append(number)
            most.append(len(inside))
            inside.remove(number)
        return own is not None

    with futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [True] * 6  # one after the other
    assert most == [1] * 6
    assert files.list_names(folder) == []


def test_nobody_waits_for_one_that_writes(folder, capsys):
    with claim.take(folder) as own:
        own.announce_writing()
        with claim.take(folder) as second:
            assert second is None
        assert f"process {os.getpid()} on " in capsys.readouterr().out
    with claim.take(folder) as third:
        assert third is not None


def test_the_claim_of_a_process_that_has_died_ends(folder, monkeypatch):
    now = [1000.0 + claim.EXPIRY_SECS]
    monkeypatch.setattr(claim, "_now", lambda: now[0])
    _leave(folder)
    with claim.take(folder) as own:
        assert own is None  # it may still be alive
    now[0] += 1
    with claim.take(folder) as own:
        assert own is not None
        assert own.path.endswith(".claim-0001.json")  # whoever also saw it end cannot create this
        assert not claim.Claim(own.path).create()
        assert files.list_names(folder) == [".claim-0001.json"]
    assert files.list_names(folder) == []
    # On this machine it is known at once: no such process, or this one, which holds no such claim.
    for pid in (2**22 + 1, os.getpid()):
        _leave(folder, machine=claim._machine(), pid=pid, renewed=now[0])
        with claim.take(folder) as own:
            assert own is not None
    _leave(folder, machine=claim._machine(), pid=os.getppid(), renewed=now[0])
    with claim.take(folder) as own:
        assert own is None


def test_a_request_whose_answer_was_lost_has_succeeded(folder):
    own = claim.Claim(files.join(folder, ".claim-0000.json"))
    files.write_bytes(own.path, own._content())
    assert own.create()
    own.release()
    assert files.list_names(folder) == []
