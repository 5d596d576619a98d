"""Runs shard tasks: in local processes, or on a Ray cluster.

What a task does, and whether it has to be done, is not known here. The engines are
`engine_local.py` and `engine_ray.py`; since a task is a function of its input alone, they write the
same bytes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from absl import logging

from data_prep.jobs.engine_local import LocalWorkerPool
from data_prep.jobs.engine_ray import RaySettings, run_on_ray
from data_prep.jobs.progress import Function, Outcome, Progress, Report, call_function
from diht_jax.data.escaping import escape_lines

__all__ = [
    "ENGINES",
    "Outcome",
    "RaySettings",
    "Report",
    "print_failures",
    "run_pending",
    "run_tasks",
]

ENGINES = ("local", "ray")

_Task = TypeVar("_Task")


def run_pending(
    function: Function,
    tasks: Sequence[Any],
    *,
    num_workers: int | None,
    label: str,
    retries: int = 1,
    ray: RaySettings | None = None,
) -> dict[str, str]:
    """Runs tasks whose results lie in files, and logs every failure; arguments of `run_tasks`.

    Args:
        function: see `run_tasks`.
        tasks: those that are not done yet, each with a `source`.
        num_workers, label, retries, ray: see `run_tasks`.

    Returns:
        Sources that failed, with the reason.
    """
    failures = {}
    for outcome in run_tasks(
        function, tasks, num_workers=num_workers, label=label, retries=retries, ray=ray
    ):
        if outcome.error is not None:
            failures[str(outcome.task.source)] = outcome.error
            logging.error("%s failed: %s", outcome.task.source, outcome.error)
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
    ray: RaySettings | None = None,
) -> Iterator[Outcome[_Task, Any]]:
    """Calls `function(task, report)` for every task; a failure does not stop the others.

    A progress bar on stderr shows shards done, their ETA, and pairs per second. A task whose worker
    dies, or whose function raises an OSError, is tried again when all others are done; in local
    processes alone then, with all the memory there is.

    Args:
        function: importable by its name; calls `report(n)` whenever it has done n more pairs.
        tasks: picklable.
        num_workers: processes; 0 runs in this process, None takes one per core (of the cluster).
        label: of the progress bar.
        retries: how often a task is tried again.
        ray: where the tasks run on a Ray cluster; None for local processes.

    Yields:
        One outcome for each task, in the order in which they end.

    Raises:
        ValueError: the number of workers or of retries is negative, or there is no such cluster.
    """
    for name, value in (("num_workers", num_workers), ("retries", retries)):
        if value is not None and value < 0:
            raise ValueError(f"config.{name}={value}; expected at least 0")
    if not tasks:
        return
    with Progress(len(tasks), label) as progress:
        pending = list(tasks)
        for attempt in range(retries + 1):
            again = []
            for outcome in _run_once(function, pending, num_workers, attempt, ray, progress):
                if outcome.may_pass and attempt < retries:
                    alone = ", alone" if ray is None else ""
                    logging.warning("%s; its task will run again%s", outcome.error, alone)
                    again.append(outcome.task)
                    continue
                progress.advance()
                yield outcome
            pending = again


def _run_once(
    function: Function,
    tasks: Sequence[_Task],
    num_workers: int | None,
    attempt: int,
    ray: RaySettings | None,
    progress: Progress,
) -> Iterator[Outcome[_Task, Any]]:
    if not tasks:
        return iter(())
    if ray is not None:
        return run_on_ray(function, tasks, ray, num_workers, progress)
    if num_workers == 0:
        return (call_function(function, task, progress.add) for task in tasks)
    count = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    return LocalWorkerPool(function, tasks, 1 if attempt else count, progress).run()
