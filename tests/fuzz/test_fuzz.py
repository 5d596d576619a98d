"""A short run over every kind of input; `python -m tests.fuzz` is the long one."""

import os
import signal

import pytest

from tests.fuzz import runner, tars, worker
from tests.fuzz.cases import SKIP, Draw, Refused, WrongError, attempt, judge_entries

_CASES = 200


def test_two_hundred_cases():
    jobs = {kind: range(count) for kind, count in runner.share_out(_CASES).items()}
    summary = runner.run(jobs, seed=0)
    shown = "\n\n".join(map("\n".join, summary.failures[:3]))
    assert not summary.failures, f"{len(summary.failures)} failures, such as\n{shown}"
    assert summary.num_cases >= _CASES
    assert {kind for kind, _ in summary.outcomes} == set(runner.WEIGHTS)
    assert {outcome for _, outcome in summary.outcomes} == {"success", "error", "skip"}


def test_cases_are_the_same_for_the_same_seed(tmp_path):
    archives = []
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        draw = Draw(0 if folder != "c" else 1, "tars", 3)
        tars.MUTATIONS["cut off"](draw, tmp_path / folder)
        archives.append((tmp_path / folder / "archive.tar").read_bytes())
    assert archives[0] == archives[1] != archives[2]


def test_what_is_wrong_is_found():
    """The judge itself: lost, changed, made-up, uncounted pairs; errors without a place."""
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


class _Module:
    """A kind whose cases end badly."""

    def __init__(self, end):
        self.MUTATIONS = {"bad": lambda draw, folder: end()}


def test_crashes_and_hangs_are_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "LIMIT_SECS", 0.1)
    previous = signal.getsignal(signal.SIGALRM)
    try:
        signal.signal(signal.SIGALRM, worker.raise_hang)

        def hang():
            while True:
                pass

        def crash():
            return [][1]

        ends = {"HangError": hang, "IndexError": crash, "no outcome": lambda: 3}
        for text, end in ends.items():
            result = worker.run_case(_Module(end), Draw(0, "x", 0), tmp_path / "case")
            assert text in result["failure"]
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_a_worker_that_dies_costs_one_case(tmp_path, monkeypatch):
    """A kind whose second case kills its process."""
    package = tmp_path / "tests" / "fuzz"
    package.mkdir(parents=True)
    for name in ("__init__.py", "cases.py", "worker.py"):
        (package / name).symlink_to(os.path.join(os.path.dirname(runner.__file__), name))
    (package / "deadly.py").write_text(
        "import os, signal\n"
        "def case(draw, folder):\n"
        "    if draw.number == 1:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return 'success'\n"
        "MUTATIONS = {'deadly': case}\n"
    )
    monkeypatch.setattr(runner, "_REPOSITORY", tmp_path)
    summary = runner.run({"deadly": range(4)}, seed=0)
    assert summary.outcomes == {("deadly", "success"): 3}
    assert [name for name, _, _ in summary.failures] == ["deadly:1"]
