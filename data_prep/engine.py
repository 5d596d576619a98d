"""Runs shard tasks in local processes, one task at a time in each.

The commands of `data_prep` call `run_tasks`. What a task does, and whether it has to be done, is
not known here. Workers are spawned, not forked: the parent may have threads.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from tqdm import tqdm

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

Report = Callable[[int], None]
Function = Callable[[Any, Report], Any]

_POLL_SECS = 0.5
_LOG_SECS = 30.0
_DIED = "the worker process died, most likely for want of memory; fewer workers may help"
# The libraries under spaCy and NumPy would start a thread per core in every worker.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_counter: Any = None  # of the worker process: pairs done by all workers


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[_Task, _Result]):
    """How one task ended.

    Attributes:
        task: the task.
        result: what the function returned; None after an error.
        error: what went wrong; None after success.
    """

    task: _Task
    result: _Result | None = None
    error: str | None = None


def run_tasks(
    function: Function, tasks: Sequence[_Task], *, num_workers: int | None, label: str
) -> Iterator[Outcome[_Task, Any]]:
    """Calls `function(task, report)` for every task; a failure does not stop the others.

    A progress bar on stderr shows shards done, their ETA, and pairs per second.

    Args:
        function: importable by its name; calls `report(n)` whenever it has done n more pairs.
        tasks: picklable.
        num_workers: processes; 0 runs in this process, None takes one per core.
        label: of the progress bar.

    Yields:
        One outcome per task, in the order in which they end.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 0:
        raise ValueError(f"config.num_workers={num_workers}; expected at least 0")
    if not tasks:
        return
    num_workers = min(num_workers, len(tasks))
    counter = multiprocessing.get_context("spawn").Value("Q", 0)
    with _Progress(len(tasks), label, counter) as progress:
        if num_workers == 0:
            outcomes = _run_here(function, tasks, progress)
        else:
            outcomes = _run_in_pools(function, tasks, num_workers, progress)
        for outcome in outcomes:
            progress.advance()
            yield outcome


class _Progress:
    """The bar; `refresh` is called now and then while tasks run."""

    def __init__(self, num_tasks: int, label: str, counter: Any):
        self.counter = counter
        self._bar = tqdm(total=num_tasks, desc=label, unit="shard", dynamic_ncols=True)
        # A log file gets a line now and then, a terminal a lively bar.
        self._interval_secs = _POLL_SECS if sys.stderr.isatty() else _LOG_SECS
        self._start_secs = self._last_secs = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._describe_rate()
        self._bar.close()

    def advance(self) -> None:
        self._describe_rate()
        self._bar.update(1)

    def add(self, pairs: int) -> None:
        with self.counter.get_lock():
            self.counter.value += pairs
        self.refresh()

    def refresh(self) -> None:
        if time.monotonic() - self._last_secs >= self._interval_secs:
            self._describe_rate()
            self._bar.refresh()

    def _describe_rate(self) -> None:
        self._last_secs = time.monotonic()
        pairs = self.counter.value
        rate = pairs / max(self._last_secs - self._start_secs, 1e-9)
        self._bar.set_postfix_str(f"{pairs:,} pairs, {rate:,.0f} pairs/s", refresh=False)


def _run_here(
    function: Function, tasks: Sequence[_Task], progress: _Progress
) -> Iterator[Outcome[_Task, Any]]:
    for task in tasks:
        try:
            yield Outcome(task, function(task, progress.add))
        except Exception as error:
            yield Outcome(task, error=_describe(error))


def _run_in_pools(
    function: Function, tasks: Sequence[_Task], num_workers: int, progress: _Progress
) -> Iterator[Outcome[_Task, Any]]:
    """One pool after another, should a worker die; whoever may have killed it runs alone."""
    pending = collections.deque(tasks)
    while pending:
        suspects = []
        for outcome in _run_pool(function, pending, num_workers, progress):
            if outcome.error is _DIED:
                suspects.append(outcome.task)
            else:
                yield outcome
        for task in suspects:
            yield from _run_pool(function, collections.deque([task]), 1, progress)


def _run_pool(
    function: Function, pending: collections.deque[_Task], num_workers: int, progress: _Progress
) -> Iterator[Outcome[_Task, Any]]:
    """Takes tasks from `pending` until there are none, or until a worker dies."""
    with (
        _environment(_ONE_THREAD),
        futures.ProcessPoolExecutor(
            num_workers,
            multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(progress.counter,),
        ) as pool,
    ):
        call = functools.partial(_call, function)
        running: dict[futures.Future[Any], _Task] = {}
        try:
            is_broken = False
            while running or (pending and not is_broken):
                # One more than the workers, so that none of them waits for us.
                while pending and not is_broken and len(running) <= num_workers:
                    try:
                        running[pool.submit(call, pending[0])] = pending[0]
                    except BrokenProcessPool:
                        is_broken = True
                    else:
                        pending.popleft()
                done, _ = futures.wait(running, _POLL_SECS, futures.FIRST_COMPLETED)
                progress.refresh()
                for future in done:
                    outcome = _outcome(running.pop(future), future)
                    is_broken = is_broken or outcome.error is _DIED
                    yield outcome
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _outcome(task: _Task, future: futures.Future[Any]) -> Outcome[_Task, Any]:
    try:
        return Outcome(task, future.result())
    except BrokenProcessPool:
        return Outcome(task, error=_DIED)
    except Exception as error:
        return Outcome(task, error=_describe(error))


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter


def _call(function: Function, task: Any) -> Any:
    return function(task, _add_to_counter)


def _add_to_counter(pairs: int) -> None:
    with _counter.get_lock():
        _counter.value += pairs


def _describe(error: Exception) -> str:
    # These are written for people; anything else is a defect, and its place is needed.
    if isinstance(error, ValueError | OSError):
        return str(error)
    return "".join(traceback.format_exception(error))


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets variables that are not set, for processes started meanwhile."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]
