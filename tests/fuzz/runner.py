"""Divides cases among the kinds of input, and runs them in a process that may die."""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

from tests.compiling import xla_flags
from tests.fuzz import worker

# Kind (a module of `kinds/`) -> its share of the cases.
WEIGHTS = {
    **{"tars": 18, "tables": 11, "records": 23, "images": 20, "training": 3, "embeddings": 8},
    **{"benchmarks": 9, "configs": 10, "weights": 11, "vocabularies": 6, "workdirs": 4, "tfds": 2},
    **{"model_directories": 5, "config_ranges": 5, "storage": 3},
}
# A process that reports nothing for so long waits for something, or hangs in a library.
_SILENCE_SECS = 6 * worker.LIMIT_SECS
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": xla_flags()}


def share_out(cases: int, kinds: Mapping[str, int] = WEIGHTS) -> dict[str, int]:
    """Kind -> number of cases, at least one each, `cases` together or (by rounding up) more."""
    total = sum(kinds.values())
    return {kind: -(-cases * weight // total) for kind, weight in kinds.items()}


def run(
    jobs: Mapping[str, int],
    seed: int,
    profile: str = "suite",
    on_case: Callable[[], Any] = lambda: None,
    package: str = "tests.fuzz.kinds",
) -> dict[str, worker.Result]:
    """Runs properties; a process that dies or hangs costs the property that it was at.

    Args:
        jobs: kind or `KIND:PROPERTY` -> cases.
        seed: of all of them.
        profile: "suite", or "long", which shrinks the cases that fail.
        on_case: is called for each case.
        package: where the kinds' modules are.

    Returns:
        `KIND:PROPERTY` -> what came of it.
    """
    results = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        process = _Process(pathlib.Path(folder), on_case)
        try:
            for job, cases in jobs.items():
                kind, _, name = job.partition(":")
                names = [name] if name else process.ask(f"{package}.{kind}")
                for name in names:
                    count = -(-cases // len(names))
                    try:
                        answer = process.ask(f"{package}.{kind}", name, count, seed, profile)
                    except _DeadError as error:
                        answer = worker.Result(failure=str(error))
                    results[f"{kind}:{name}"] = answer
        finally:
            process.kill()
    return results


class _DeadError(RuntimeError):
    """The process has died or hung, and was replaced."""


class _Process:
    """A worker process, started when it is needed, and again when it has died."""

    def __init__(self, folder: pathlib.Path, on_case: Callable[[], Any]):
        self._folder, self._on_case = folder, on_case
        self._log = folder / "log"
        self._process: Any = None

    def ask(self, *request: Any) -> Any:
        """The answer of `worker.serve`."""
        if self._process is None:
            self._start()
        self._connection.send(request)
        cases = 0
        try:
            while self._connection.poll(_SILENCE_SECS):
                answer = self._connection.recv()
                if answer is not None:
                    return answer
                cases += 1
                self._on_case()
        except EOFError:
            pass
        self.kill()
        tail = self._log.read_text(errors="replace")[-3000:]
        raise _DeadError(f"the process died or hung in case {cases} of {request}:\n{tail}")

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        base = pathlib.Path(tempfile.mkdtemp(dir=self._folder))
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.serve, args=(theirs, base, self._log))
        storage = {"HYPOTHESIS_STORAGE_DIRECTORY": str(base / "hypothesis")}
        with mock.patch.dict(os.environ, _ENVIRONMENT | storage):
            self._process.start()
        theirs.close()

    def kill(self) -> None:
        """Ends the process, whatever it does."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None
