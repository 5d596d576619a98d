"""Divides cases among the kinds of input, and runs them in processes that may die.

Called by the command (`__main__.py`) and by the short test.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import selectors
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from tests.fuzz.worker import LIMIT_SECS

# Kind (a module beside this one) -> its share of the cases.
WEIGHTS = {
    "tars": 18,
    "tables": 11,
    "records": 15,
    "indices": 8,
    "images": 20,
    "training": 3,
    "embeddings": 8,
    "benchmarks": 9,
    "configs": 10,
    "weights": 16,
    "vocabularies": 6,
    "workdirs": 4,
    "tfds": 2,
}
# A process that says nothing for so long hangs where no signal reaches it; imports count as well.
_SILENCE_SECS = 4 * LIMIT_SECS
_REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Summary:
    """What came of a run.

    Attributes:
        outcomes: (kind, outcome) -> cases.
        failures: of each failed case, its name (`KIND:NUMBER`), its mutation, and what happened.
        secs: kind -> seconds in its cases.
        slowest: seconds of the slowest case, and its name.
    """

    outcomes: collections.Counter[tuple[str, str]] = dataclasses.field(
        default_factory=collections.Counter
    )
    failures: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    secs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    slowest: tuple[float, str] = (0.0, "none")

    @property
    def num_cases(self) -> int:
        """How many cases have ended, in whatever way."""
        return self.outcomes.total() + len(self.failures)


def share_out(cases: int, kinds: Mapping[str, int] = WEIGHTS) -> dict[str, int]:
    """Kind -> number of cases, at least one each, `cases` together or (by rounding up) more."""
    total = sum(kinds.values())
    return {kind: -(-cases * weight // total) for kind, weight in kinds.items()}


def run(jobs: Mapping[str, range], seed: int, progress: Any = None) -> Summary:
    """Runs cases; a worker that dies or hangs costs the case that it was at.

    Args:
        jobs: kind -> numbers of its cases.
        seed: of all of them.
        progress: a bar of tqdm, or None.
    """
    summary = Summary()
    waiting = dict(jobs)
    while waiting:
        current: tuple[str, int] | None = None
        with tempfile.TemporaryFile() as errors:
            for report in _reports(waiting, seed, errors):
                kind, case = report["kind"], report["case"]
                if report["state"] == "preparing":
                    current = None
                    continue
                if report["state"] == "started":
                    current = kind, case
                    continue
                current = None
                _count(summary, report)
                _advance(waiting, kind, case)
                if progress is not None:
                    progress.update()
            if current is None and waiting:
                raise RuntimeError(f"no case of {next(iter(waiting))} could start: {_tail(errors)}")
            if current is not None:
                text = f"the process died or hung: {_tail(errors)}"
                summary.failures.append((f"{current[0]}:{current[1]}", "?", text))
                _advance(waiting, *current)
    return summary


def _reports(jobs: Mapping[str, range], seed: int, errors: BinaryIO) -> Iterator[dict[str, Any]]:
    """What a new worker says, until it ends; it is killed where it says nothing for too long."""
    names = [f"{kind}:{numbers.start}:{numbers.stop}" for kind, numbers in jobs.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": ""}
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.fuzz.worker", str(seed), *names],
        cwd=_REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=errors,
    )
    rest = b""
    with worker, selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        try:
            while selector.select(_SILENCE_SECS):
                data = os.read(worker.stdout.fileno(), 2**16)
                if not data:
                    break
                *lines, rest = (rest + data).split(b"\n")
                yield from map(json.loads, lines)
        finally:
            worker.kill()


def _count(summary: Summary, report: Mapping[str, Any]) -> None:
    summary.secs[report["kind"]] += report["secs"]
    summary.slowest = max(summary.slowest, (report["secs"], f"{report['kind']}:{report['case']}"))
    if "outcome" in report:
        summary.outcomes[report["kind"], report["outcome"]] += 1
    else:
        name = f"{report['kind']}:{report['case']}"
        summary.failures.append((name, report["mutation"], report["failure"]))


def _advance(waiting: dict[str, range], kind: str, case: int) -> None:
    """Takes a case, and those of the kind before it, off the list."""
    waiting[kind] = range(case + 1, waiting[kind].stop)
    if not waiting[kind]:
        del waiting[kind]


def _tail(errors: BinaryIO) -> str:
    errors.seek(0, os.SEEK_END)
    errors.seek(max(0, errors.tell() - 2000))
    return errors.read().decode("utf-8", "replace")
