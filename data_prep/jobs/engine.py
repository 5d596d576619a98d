"""Runs shard tasks: in local processes, or on a Ray cluster.

What a task does, and whether it has to be done, is not known here. The engines are
`engine_local.py` and `engine_ray.py`; since a task is a function of its input alone, they write the
same bytes.
"""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ml_collections
from absl import logging

from data_prep.jobs.engine_local import LocalWorkerPool
from data_prep.jobs.engine_ray import RaySettings, run_on_ray
from data_prep.jobs.progress import (
    DEATH,
    KILLED,
    LOST,
    STORAGE,
    TIMEOUT,
    Function,
    Outcome,
    Progress,
    Report,
    TaskQueue,
    call_function,
)
from diht_jax.records.escaping import escape_lines

__all__ = [
    "ENGINES",
    "Outcome",
    "RaySettings",
    "Report",
    "engine_options",
    "print_failures",
    "run_pending",
    "run_tasks",
]

ENGINES = ("local", "ray")

# A task that failed goes behind so many others.
_OTHERS_FIRST = 8
# Before each further attempt of one that its storage has failed: a store that is down, or a file
# server that is moved, is away for minutes.
_STORAGE_DELAYS_SECS = (30.0, 120.0, 480.0)
# Nodes of a cluster that may be taken away at any time; the task has nothing to do with it.
_MAX_LOST_NODES = 10

_Task = TypeVar("_Task")

# Task, and whether it is to blame for the end of its worker -> the task to run next, or None.
AfterDeath = Callable[[Any, bool], Any]


def engine_options(config: ml_collections.ConfigDict, engine: str) -> dict[str, Any]:
    """How the tasks of a config are run: keywords of `run_pending`.

    Args:
        config: how many workers, retries, and which cluster.
        engine: one of `engine.ENGINES`.
    """
    return {
        "num_workers": config.num_workers,
        "retries": config.retries,
        "timeout_secs": config.shard_timeout_secs,
        "ray": RaySettings(**config.ray.to_dict()) if engine == "ray" else None,
    }


def run_pending(
    function: Function,
    tasks: Sequence[Any],
    *,
    num_workers: int | None,
    label: str,
    retries: int = 1,
    timeout_secs: float | None = None,
    after_death: AfterDeath | None = None,
    ray: RaySettings | None = None,
    on_result: Callable[[Any], None] = lambda _: None,
) -> dict[str, str]:
    """Runs tasks whose results lie in files, and logs every failure; arguments of `run_tasks`.

    Args:
        function: see `run_tasks`.
        tasks: those that are not done yet, each with a `source`.
        num_workers, label, retries, timeout_secs, after_death, ray: see `run_tasks`.
        on_result: called with what the function has returned of a task.

    Returns:
        Sources that failed, with the reason.
    """
    failures = {}
    for outcome in run_tasks(
        function,
        tasks,
        num_workers=num_workers,
        label=label,
        retries=retries,
        timeout_secs=timeout_secs,
        after_death=after_death,
        ray=ray,
    ):
        if outcome.error is not None:
            failures[str(outcome.task.source)] = outcome.error
            logging.error("%s failed: %s", outcome.task.source, outcome.error)
        else:
            on_result(outcome.result)
    return failures


def print_failures(failures: dict[str, str]) -> dict[str, str]:
    """Lists on stderr what failed, at the end of a job; returns the same dict."""
    for source, error in failures.items():
        print(escape_lines(f"failed: {source}: {error}"), file=sys.stderr)
    return failures


def run_tasks(
    function: Function,
    tasks: Sequence[_Task],
    *,
    num_workers: int | None,
    label: str,
    retries: int = 1,
    timeout_secs: float | None = None,
    after_death: AfterDeath | None = None,
    ray: RaySettings | None = None,
) -> Iterator[Outcome[_Task, Any]]:
    """Calls `function(task, report)` for every task; a failure does not stop the others.

    A progress bar on stderr shows shards done, their ETA, and pairs per second. A task that may
    succeed when it is run again soon runs again among the others: one to which the system refused
    something, one that took too long (once), and one whose worker died. One that a disk or a store
    has failed runs again after some time, three times. But where a local worker was killed from
    outside, as the kernel does when memory runs out, the task waits for the end of the others and
    runs alone, with all the memory there is.

    Args:
        function: importable by its name; calls `report(n)` whenever it has done n more pairs.
        tasks: picklable.
        num_workers: processes; 0 runs in this process, None takes one per core (of the cluster).
        label: of the progress bar.
        retries: how often a task is run again after failures of each kind; failures of its storage,
            and lost nodes of a cluster, have limits of their own, unless this is 0.
        timeout_secs: after which a task's worker is stopped; needs worker processes.
        after_death: called when the worker of a task has died, unless `retries` is 0: with the
            task, and whether it may be to blame. Returns the task to run next in place of it; None
            ends the attempts. Where it is not given, `retries` counts deaths too.
        ray: where the tasks run on a Ray cluster; None for local processes.

    Yields:
        One outcome for each task, in the order in which they end; `task` is what ran last.

    Raises:
        ValueError: a number is out of its range, or there is no such cluster.
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
    policy = _Retries(retries, after_death)
    alone = TaskQueue(())
    with Progress(len(tasks), label) as progress:
        for pending, count in ((TaskQueue(tasks), num_workers), (alone, 1)):
            while pending or pending.wait():
                for outcome in _run_queue(function, pending, count, timeout_secs, ray, progress):
                    again = policy.next_attempt(outcome)
                    if again is None:
                        progress.advance()
                        yield outcome
                        continue
                    is_alone = outcome.cause == KILLED and ray is None
                    delay_secs = policy.delay_secs(again) if outcome.cause == STORAGE else 0.0
                    when = f", in {delay_secs:.0f} s" if delay_secs else ""
                    logging.warning(
                        "%s: %s; its task will run again%s",
                        getattr(outcome.task, "source", outcome.task),
                        outcome.error,
                        ", alone" if is_alone else when,
                    )
                    if is_alone:
                        alone.insert(len(alone), again)
                    elif delay_secs:
                        pending.insert_later(delay_secs, again)
                    else:
                        pending.insert(_OTHERS_FIRST, again)


class _Retries:
    """Decides whether a task that failed is run again, and as what."""

    def __init__(self, retries: int, after_death: AfterDeath | None):
        self._retries = retries
        self._after_death = after_death
        # By identity of the task, which is kept so that no other gets its number.
        self._failures: dict[int, tuple[Any, collections.Counter[str]]] = {}

    def next_attempt(self, outcome: Outcome[Any, Any]) -> Any:
        """The task to run next in place of one that ended; None where its outcome is final."""
        task, cause = outcome.task, outcome.cause
        if cause is None:
            return None
        is_searched = self._after_death is not None and self._retries > 0
        if cause == KILLED and not is_searched:
            cause = DEATH  # of whatever, the second one is the last
        _, failures = self._failures.pop(id(task), (task, collections.Counter()))
        failures[cause] += 1
        again = task
        if is_searched and cause in (DEATH, KILLED, LOST):
            again = self._after_death(task, cause == DEATH)
        if not (is_searched and cause == DEATH):
            again = again if failures[cause] <= self._limit(cause) else None
        if again is not None:
            self._failures[id(again)] = again, failures
        return again

    def delay_secs(self, task: Any) -> float:
        """How long a task waits that its storage has failed, and that `next_attempt` returned."""
        _, failures = self._failures[id(task)]
        return _STORAGE_DELAYS_SECS[failures[STORAGE] - 1]

    def _limit(self, cause: str) -> int:
        """How often a task is run again after failures of a kind."""
        if cause == TIMEOUT:
            return 1  # a shard that took too long twice goes on to take too long
        limits = {STORAGE: len(_STORAGE_DELAYS_SECS), LOST: _MAX_LOST_NODES}
        return limits.get(cause, self._retries) if self._retries else 0


def _run_queue(
    function: Function,
    tasks: TaskQueue,
    num_workers: int | None,
    timeout_secs: float | None,
    ray: RaySettings | None,
    progress: Progress,
) -> Iterator[Outcome[Any, Any]]:
    """Runs the tasks of a queue, also those that are put into it when an outcome is yielded."""
    if not tasks:
        return iter(())
    if ray is not None:
        return run_on_ray(function, tasks, ray, num_workers, progress, timeout_secs)
    if num_workers == 0:
        return _run_here(function, tasks, progress)
    count = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    return LocalWorkerPool(function, tasks, count, progress, timeout_secs).run()


def _run_here(
    function: Function, tasks: TaskQueue, progress: Progress
) -> Iterator[Outcome[Any, Any]]:
    while tasks:
        yield call_function(function, tasks.popleft(), progress.add)
