"""A short run over every kind of input; `python -m tests.fuzz` is the long run."""

import pytest

from tests.fuzz import runner
from tests.fuzz.judge import OUTCOMES, SKIP, Refused, WrongError, attempt, judge_entries

_CASES = 356
# A filter writes more kinds of files than any other command, and the others are the cheapest.
_MORE = {"written:filter": 64, "written:others": 48}


def test_every_input_is_read_refused_or_skipped():
    results = runner.run(runner.share_out(_CASES) | _MORE, seed=0)
    failures = [f"{name}\n{result.failure}" for name, result in results.items() if result.failure]
    assert not failures, f"{len(failures)} failures, such as\n" + "\n\n".join(failures[:3])
    assert {name.partition(":")[0] for name in results} == set(runner.WEIGHTS)
    assert {outcome for result in results.values() for outcome in result.outcomes} == set(OUTCOMES)


def test_what_is_wrong_is_found():
    """Tests the judge: lost, changed, made-up and uncounted pairs; errors that name nothing."""
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
