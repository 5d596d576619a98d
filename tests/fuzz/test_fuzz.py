"""A short run over every kind of input; `python -m tests.fuzz` is the long one."""

import pytest

from tests.fuzz import runner
from tests.fuzz.judge import OUTCOMES, SKIP, Refused, WrongError, attempt, judge_entries

_CASES = 320

_BROKEN_KIND = """
import os, pathlib, signal
from hypothesis import strategies as st
from tests.fuzz import runner

def prepare(base):
    runner.LIMIT_SECS = 4

def check_drawn(draw, folder):
    with open(pathlib.Path(__file__).with_suffix(".log"), "a") as log:
        print(draw(st.binary()), file=log)
    return "success"

def check_hang(draw, folder):
    while True:
        pass

def check_crash(draw, folder):
    return [][draw(st.integers(7, 99))]

def check_memory(draw, folder):
    return "success" if b"x" * 3 * 2 ** 28 else "error"

def check_addresses(draw, folder):
    return "success" if bytearray(2 ** 33) else "error"

def check_death(draw, folder):
    os.kill(os.getpid(), signal.SIGKILL)

def check_after_death(draw, folder):
    return "skip"
"""


def test_every_input_is_read_refused_or_skipped():
    results = runner.run(runner.share_out(_CASES), seed=0)
    failures = [f"{name}\n{result.failure}" for name, result in results.items() if result.failure]
    assert not failures, f"{len(failures)} failures, such as\n" + "\n\n".join(failures[:3])
    assert {name.partition(":")[0] for name in results} == set(runner.WEIGHTS)
    assert {outcome for result in results.values() for outcome in result.outcomes} == set(OUTCOMES)


def test_what_is_wrong_is_found():
    """The judge itself: lost, changed, made-up, uncounted pairs; errors that name nothing."""
    good = {"a": 1, "b": 2}
    assert judge_entries([("a", 1), ("b", 2)], {"no_image": 1}, good, ["c"]) == SKIP
    wrong = [
        ([("a", 1)], {}, []),
        ([("a", 1), ("b", 3)], {}, []),
        ([("a", 1), ("b", 2), ("x", 3)], {}, []),
        ([("b", 2), ("a", 1)], {}, []),
        ([("a", 1), ("a", 1), ("b", 2)], {}, []),
        ([("a", 1), ("b", 2)], {}, ["c"]),
    ]
    for found, skipped, touched in wrong:
        with pytest.raises(WrongError):
            judge_entries(found, skipped, good, touched)

    def fail(error):
        raise error

    assert attempt(lambda: fail(ValueError("a.tar: cut off")), "a.tar") == Refused("a.tar: cut off")
    with pytest.raises(WrongError):
        attempt(lambda: fail(ValueError("cut off")), "a.tar")
    with pytest.raises(KeyError):
        attempt(lambda: fail(KeyError("a.tar")), "a.tar")


def test_crashes_hangs_memory_and_death_are_failures_and_seeds_repeat(tmp_path, monkeypatch):
    path = tmp_path / "broken_kinds" / "broken.py"
    path.parent.mkdir()
    path.write_text(_BROKEN_KIND)
    monkeypatch.syspath_prepend(tmp_path)
    results = runner.run({"broken": 56}, seed=0, profile="long", package="broken_kinds")
    expected = {
        "hang": "HangError",
        "crash": "Draw 1: 7",  # the smallest number that fails
        "memory": "memory grew by 7",
        "addresses": "MemoryError",
        "death": "the process died or hung",
    }
    for name, text in expected.items():
        assert text in results[f"broken:{name}"].failure
    assert results["broken:after_death"].failure is None
    assert results["broken:after_death"].outcomes["skip"] > 0

    log = path.with_suffix(".log")
    first = log.read_text()
    assert len(set(first.splitlines())) > 5
    for seed in (0, 1):
        log.unlink()
        runner.run({"broken:drawn": 8}, seed, package="broken_kinds")
        assert (log.read_text() == first) == (seed == 0)
