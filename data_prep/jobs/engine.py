"""Runs tasks: in this process, in processes of this machine, or on a Ray cluster.

What a task does, and whether it has to be done, is not known here. Since a task is a function of
its input alone, all engines write the same bytes.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import ml_collections
from absl import logging

from data_prep.jobs.cluster import RayPool, RaySettings
from data_prep.jobs.outcome import (
    DEATH,
    FULL,
    KILLED,
    LOST,
    NOT_STARTED,
    POLL_SECS,
    STORAGE,
    TIMEOUT,
    Function,
    Outcome,
    Report,
    call_function,
)
from data_prep.jobs.processes import LocalPool
from diht_jax.storage.retries import FullError
from diht_jax.terminal import ProgressBar, print_escaped

__all__ = ["ENGINES", "Outcome", "RaySettings", "Report", "engine_options", "run_tasks"]

ENGINES = ("local", "ray")

# A task that failed goes behind this many others.
_OTHERS_FIRST = 8
# Before each further attempt of one that its storage has failed: a store that is down, or a file
# server that is moved, is away for minutes.
_STORAGE_DELAYS_SECS = (30.0, 120.0, 480.0)
# Nodes of a cluster that may be taken away at any time; the task has nothing to do with it.
_MAX_LOST_NODES = 10
_STALL_SECS = 300.0

_now, _sleep = time.monotonic, time.sleep  # of delayed tasks; tests put their own clock here

# Task, and whether it is to blame for the end of its worker -> the task to run next, or None.
AfterDeath = Callable[[Any, bool], Any]
Failed = TypeVar("Failed", bound=Mapping[str, str])


def engine_options(config: ml_collections.ConfigDict, engine: str) -> dict[str, Any]:
    """Keywords of `run_pending` that say how the tasks of a config are run."""
    return {
        "num_workers": config.num_workers,
        "retries": config.retries,
        "timeout_secs": config.shard_timeout_secs,
        "ray": RaySettings(**config.ray.to_dict()) if engine == "ray" else None,
    }


def run_pending(
    function: Function,
    tasks: Sequence[Any],
    **options: Any,
) -> dict[str, str]:
    """Runs tasks whose results are files, and logs every failure.

    Args:
        function: see `run_tasks`.
        tasks: those that are not done yet, each with a `source`.
        **options: of `run_tasks`.

    Returns:
        Sources that failed, with the reason.
    """
    failures = {}
    for outcome in run_tasks(function, tasks, **options):
        if outcome.error is not None:
            failures[str(outcome.task.source)] = outcome.error
            logging.error("%s failed: %s", outcome.task.source, outcome.error)
    return failures


def print_failures(failures: Failed) -> Failed:
    """Lists on stderr what failed, at the end of a job; returns the same dict."""
    for source, error in failures.items():
        print_escaped(f"failed: {source}: {error}", file=sys.stderr)
    return failures


def run_tasks(
    function: Function,
    tasks: Sequence[Any],
    *,
    num_workers: int | None,
    label: str,
    retries: int = 1,
    timeout_secs: float | None = None,
    after_death: AfterDeath | None = None,
    ray: RaySettings | None = None,
) -> Iterator[Outcome]:
    """Calls `function(task, report)` for every task; a failure does not stop the others.

    A progress bar on stderr shows shards done, their ETA, and pairs per second. A task that may
    succeed when it is run again soon runs again among the others: one that took too long (once),
    and one whose worker died. One that a disk or a store has failed runs again after some time,
    three times. But where a local worker was killed from
    outside, as the kernel does when memory runs out, the task waits for the end of the others and
    runs alone, with all the memory there is.

    Args:
        function: importable by its name; calls `report(n)` whenever it has done n more pairs.
        tasks: picklable.
        num_workers: processes; 0 runs in this process, None takes one per core (of the cluster).
        label: of the progress bar.
        retries: how often a task is run again after its worker has died; failures of its storage,
            and lost nodes of a cluster, have limits of their own, unless this is 0.
        timeout_secs: after which a task's worker is stopped; needs worker processes.
        after_death: called when the worker of a task has died, unless `retries` is 0: with the
            task, and whether it may be to blame. Returns the task to run next in place of it; None
            ends the attempts. Where it is not given, `retries` counts deaths too.
        ray: where the tasks run on a Ray cluster; None for local processes.

    Yields:
        One outcome for each task, in the order in which they end; `task` is what ran last.

    Raises:
        ValueError: a number is out of its range, no worker can start, or there is no such cluster.
        FullError: there is no room for the output of a task.
    """
    for name, value in (("num_workers", num_workers), ("retries", retries)):
        if value is not None and value < 0:
            raise ValueError(f"config.{name}={value}; expected at least 0")
    if timeout_secs is not None and num_workers == 0 and ray is None:
        raise ValueError(
            f"config.shard_timeout_secs={timeout_secs:g} with config.num_workers=0: only a worker "
            "process can be stopped; set config.num_workers=1 or more"
        )
    if not tasks:
        return
    queue = _Queue(tasks)
    with _Progress(len(tasks), label) as progress:
        pool = _open_pool(function, num_workers, len(tasks), timeout_secs, ray, progress.add)
        try:
            while queue.fill(pool):
                done, _ = futures.wait(queue.busy, POLL_SECS, futures.FIRST_COMPLETED)
                pool.poll()
                for future in done:
                    attempt, outcome = queue.busy.pop(future), pool.read(future)
                    outcome = dataclasses.replace(outcome, task=attempt.task)
                    if outcome.cause == FULL:
                        raise FullError(outcome.error)
                    again = _next_attempt(attempt, outcome.cause, retries, after_death)
                    if again is None or outcome.cause is None:
                        progress.advance()
                        yield outcome
                        continue
                    when = queue.put_back(again, outcome.cause)
                    if outcome.cause != NOT_STARTED:
                        name = getattr(outcome.task, "source", outcome.task)
                        text = "%s: %s; its task will run again%s"
                        logging.warning(text, name, outcome.error, when)
                progress.refresh()
        finally:
            pool.stop()


class ThisProcess:
    """The pool that runs tasks here, one after the other; the others have the same methods."""

    room = 1  # tasks that may be under way

    def __init__(self, function: Function, add_pairs: Report):
        self._function = function
        self._add_pairs = add_pairs

    def submit(self, task: Any) -> futures.Future:
        """Starts a task, which has ended when its future is done."""
        future: futures.Future[Outcome] = futures.Future()
        future.set_result(call_function(self._function, task, self._add_pairs))
        return future

    def poll(self) -> None:
        """Looks after the tasks that are under way, and counts the pairs that are done."""

    def read(self, future: futures.Future) -> Outcome:
        """The outcome of a task that has ended."""
        return future.result()

    def narrow(self) -> None:
        """Leaves all memory to a single task."""

    def stop(self) -> None:
        """Ends all workers, at work or not."""


def _open_pool(
    function: Function,
    num_workers: int | None,
    num_tasks: int,
    timeout_secs: float | None,
    ray: RaySettings | None,
    add_pairs: Report,
) -> ThisProcess | LocalPool | RayPool:
    if ray is not None:
        return RayPool(function, ray, num_workers, timeout_secs, add_pairs)
    if num_workers == 0:
        return ThisProcess(function, add_pairs)
    count = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    return LocalPool(function, min(count, num_tasks), timeout_secs, add_pairs)


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """A task, and how often it has failed before by which cause."""

    task: Any
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class _Queue:
    """Tasks that wait for a worker, those under way, and those that are to run again."""

    def __init__(self, tasks: Sequence[Any]):
        self.busy: dict[futures.Future[Any], _Attempt] = {}
        self._ready = collections.deque(map(_Attempt, tasks))
        self._delayed: list[tuple[float, int, _Attempt]] = []  # a heap: when, and in which order
        self._alone: list[_Attempt] = []  # those that want all memory, after all others
        self._numbers = itertools.count()

    def fill(self, pool: ThisProcess | LocalPool | RayPool) -> bool:
        """Gives the pool what it has room for, after a while if need be; False at the end."""
        while True:
            while self._delayed and self._delayed[0][0] <= _now():
                self._ready.appendleft(heapq.heappop(self._delayed)[2])
            if self._alone and not (self._ready or self._delayed or self.busy):
                pool.narrow()
                self._ready.extend(self._alone)
                self._alone.clear()
            while self._ready and len(self.busy) < pool.room:
                attempt = self._ready.popleft()
                self.busy[pool.submit(attempt.task)] = attempt
            if self.busy or not self._delayed:
                return len(self.busy) > 0
            _sleep(max(self._delayed[0][0] - _now(), 0))

    def put_back(self, attempt: _Attempt, cause: str) -> str:
        """Takes a task that failed; returns when it runs again, for the log."""
        if cause == KILLED:
            self._alone.append(attempt)
            return ", alone"
        if cause != STORAGE or not (secs := _STORAGE_DELAYS_SECS[attempt.failures[cause] - 1]):
            self._ready.insert(0 if cause == NOT_STARTED else _OTHERS_FIRST, attempt)
            return ""
        heapq.heappush(self._delayed, (_now() + secs, next(self._numbers), attempt))
        return f", in {secs:.0f} s"


def _next_attempt(
    attempt: _Attempt, cause: str | None, retries: int, after_death: AfterDeath | None
) -> _Attempt | None:
    """The attempt to run in place of one that ended; None where its outcome is final."""
    if cause == NOT_STARTED:
        return attempt
    if cause is None or not (retries or cause == TIMEOUT):
        return None
    is_searched = after_death is not None and retries > 0
    counted = DEATH if cause == KILLED and not is_searched else cause
    attempt.failures[counted] += 1
    limits = {TIMEOUT: 1, STORAGE: len(_STORAGE_DELAYS_SECS), LOST: _MAX_LOST_NODES}
    is_allowed = attempt.failures[counted] <= limits.get(counted, retries)
    if is_searched and cause in (DEATH, KILLED, LOST):
        # The search ends by itself.
        task = after_death(attempt.task, cause == DEATH)
        is_allowed = task is not None and (is_allowed or cause == DEATH)
        attempt = dataclasses.replace(attempt, task=task)
    return attempt if is_allowed else None


class _Progress:
    """The progress bar, and a warning where nothing happens for long."""

    def __init__(self, num_tasks: int, label: str):
        self._pairs = 0
        self._bar = ProgressBar(total=num_tasks, desc=label, unit="shard", dynamic_ncols=True)
        self._start_secs = self._drawn_secs = self._heard_secs = time.monotonic()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._describe_rate()
        self._bar.close()

    def advance(self) -> None:
        """Counts a task that has ended."""
        self._heard_secs = time.monotonic()
        self._describe_rate()
        self._bar.update(1)

    def add(self, pairs: int) -> None:
        """Counts pairs that are done."""
        self._heard_secs = time.monotonic()
        self._pairs += pairs
        self.refresh()

    def refresh(self) -> None:
        """Draws the bar, if it was not drawn for some time."""
        now = time.monotonic()
        if now - self._drawn_secs >= POLL_SECS:
            self._describe_rate()
            self._bar.refresh()
        if now - self._heard_secs >= _STALL_SECS:
            self._heard_secs = now
            logging.warning("no sign of life from any worker for %.0f s", _STALL_SECS)

    def _describe_rate(self) -> None:
        self._drawn_secs = time.monotonic()
        rate = self._pairs / max(self._drawn_secs - self._start_secs, 1e-9)
        self._bar.set_postfix_str(f"{self._pairs:,} pairs, {rate:,.0f} pairs/s", refresh=False)
