"""Runs tasks locally or on a Ray cluster, and finds input pairs that crash a worker.

The engines do not know what a task does or whether it has to run. A task is a function of its input
alone, so all engines write the same bytes.

A crash in a library kills the whole worker, and no error names the pair. A shard whose worker died
is therefore run again and records, in a small file next to its output, the batch of pairs in
progress. If it dies again, the next run first tries the pairs of that batch one by one, and only
then processes the batch. A pair that kills this run as well is skipped in the next one. The first
death starts the search, and two more find each pair: one in its batch, one on the pair itself. A
pair is blamed only if both agree.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

import ml_collections
from absl import logging

from data_prep.jobs import workers
from data_prep.jobs.workers import Report
from diht_jax.input.workers import usable_cores
from diht_jax.readers.registry import Skipped
from diht_jax.storage import files
from diht_jax.storage.stores import FullError
from diht_jax.terminal import ProgressBar, print_escaped

ENGINES = ("local", "ray")

CRASHED = "crashed"  # reason of skipped pairs

# A failed task is queued behind this many others.
_OTHERS_FIRST = 8
# Delays before the next attempts after a storage failure. A store that is down, or a file server
# that is being moved, is unavailable for minutes.
_STORAGE_DELAYS_SECS = (30.0, 120.0, 480.0)
# Retries per cause; `retries` for the others. Cluster nodes may be taken away at any time.
_LIMITS = {workers.TIMEOUT: 1, workers.STORAGE: len(_STORAGE_DELAYS_SECS), workers.LOST: 10}

BATCH, PAIR = "batch", "pair"  # stage of a run: it processes a batch, or tries one pair of it

_MAX_CRASHED = 20  # pairs of a shard; more than these cannot all be the cause
_MAX_UNEXPLAINED = 2  # deaths per shard that did not lead to a pair

Failed = TypeVar("Failed", bound=Mapping[str, str])


def print_failures(failures: Failed) -> Failed:
    """Lists the failures on stderr at the end of a job; returns the same dict."""
    for source, error in failures.items():
        print_escaped(f"failed: {source}: {error}", file=sys.stderr)
    return failures


def run_pending(
    function: workers.Function,
    tasks: Sequence[Any],
    config: ml_collections.ConfigDict,
    engine: str = "local",
    *,
    label: str,
) -> dict[str, str]:
    """Calls `function(task, report)` for every task; a failure does not stop the others.

    A failed task that may succeed runs again, as often as `_LIMITS` allows.

    Args:
        function: importable by its name; its results are files. It calls `report(n)` whenever it
            has processed n more pairs.
        tasks: picklable, each with a `source`.
        config: has `jobs.failures.KEYS`.

    Returns:
        The `source` of each failed task, with the reason, which is also logged.

    Raises:
        ValueError: no worker can start, or there is no such cluster.
        FullError: there is no space for the output of a task.
    """
    failures: dict[str, str] = {}
    if not tasks:
        return failures
    queue = _Queue(collections.deque(map(_Attempt, tasks)), config.retries)
    with _Progress(len(tasks), label) as progress:
        pool = _open_pool(function, len(tasks), config, engine, progress.add)
        try:
            while queue.fill(pool):
                if not queue.busy:  # all others wait for their retry
                    time.sleep(workers.POLL_SECS)
                done, _ = futures.wait(queue.busy, workers.POLL_SECS, futures.FIRST_COMPLETED)
                pool.poll()
                for future in done:
                    attempt, outcome = queue.busy.pop(future), pool.read(future)
                    if outcome.cause == workers.FULL:
                        raise FullError(outcome.error)
                    if queue.retry(attempt, outcome):
                        continue
                    progress.add(0, tasks=1)
                    if outcome.error is not None:
                        failures[str(attempt.task.source)] = outcome.error
                        logging.error("%s failed: %s", attempt.task.source, outcome.error)
                progress.add(0)  # redraws the bar even if nothing happened
        finally:
            pool.stop()
    return failures


def _open_pool(
    function: workers.Function,
    num_tasks: int,
    config: ml_collections.ConfigDict,
    engine: str,
    add_pairs: Report,
) -> Any:
    if engine == "ray":
        from data_prep.jobs.cluster import RayPool

        return RayPool(function, config, add_pairs)
    if config.num_workers == 0:
        return workers.ThisProcess(function, add_pairs)
    count = usable_cores() if config.num_workers is None else config.num_workers
    return workers.LocalPool(function, min(count, num_tasks), config.shard_timeout_secs, add_pairs)


@dataclasses.dataclass(frozen=True)
class _Attempt:
    """A task, and the number of its failures by cause."""

    task: Any
    failures: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


@dataclasses.dataclass
class _Queue:
    """Tasks that wait for a worker, run now, or will be retried.

    `delayed` holds tasks with the time of their retry. `alone` holds tasks that need all of the
    memory and run at the end; only local workers are killed for a lack of memory.
    """

    ready: collections.deque[_Attempt]
    retries: int
    busy: dict[futures.Future[Any], _Attempt] = dataclasses.field(default_factory=dict)
    delayed: list[tuple[float, _Attempt]] = dataclasses.field(default_factory=list)
    alone: list[_Attempt] = dataclasses.field(default_factory=list)

    def fill(self, pool: Any) -> bool:
        """Submits tasks until the pool is full; returns False at the end."""
        for when, attempt in list(self.delayed):
            if when <= time.monotonic():
                self.delayed.remove((when, attempt))
                self.ready.appendleft(attempt)
        if self.alone and not (self.ready or self.delayed or self.busy):
            pool.narrow()
            self.ready.extend(self.alone)
            self.alone.clear()
        while self.ready and len(self.busy) < pool.room:
            attempt = self.ready.popleft()
            self.busy[pool.submit(attempt.task)] = attempt
        return bool(self.busy or self.delayed)

    def retry(self, attempt: _Attempt, outcome: workers.Outcome) -> bool:
        """Queues a failed task again if it may succeed; returns False if its outcome is final."""
        cause = outcome.cause
        if cause == workers.NOT_STARTED:
            self.ready.appendleft(attempt)
            return True
        if cause is None or not (self.retries or cause == workers.TIMEOUT):
            return False
        is_searched = hasattr(attempt.task, "search")
        counted = workers.DEATH if cause == workers.KILLED and not is_searched else cause
        attempt.failures[counted] += 1
        is_allowed = attempt.failures[counted] <= _LIMITS.get(counted, self.retries)
        if is_searched and cause in (workers.DEATH, workers.KILLED, workers.LOST):
            # The search has a limit of its own.
            task = _go_on_searching(attempt.task, may_be_blamed=cause == workers.DEATH)
            is_allowed = task is not None and (is_allowed or cause == workers.DEATH)
            attempt = dataclasses.replace(attempt, task=task)
        if not is_allowed:
            return False
        when = ""
        if cause == workers.KILLED:
            self.alone.append(attempt)
            when = ", alone"
        elif cause == workers.STORAGE:
            secs = _STORAGE_DELAYS_SECS[attempt.failures[cause] - 1]
            self.delayed.append((time.monotonic() + secs, attempt))
            when = f", in {secs:.0f} s"
        else:
            self.ready.insert(_OTHERS_FIRST, attempt)
        name, error = attempt.task.source, outcome.error
        logging.warning("%s: %s; its task will run again%s", name, error, when)
        return True


class _Progress(ProgressBar):
    """Progress bar over the tasks of a job, with the number of pairs done."""

    def __init__(self, num_tasks: int, label: str):
        super().__init__(total=num_tasks, desc=label, unit="shard", dynamic_ncols=True)
        self._pairs = 0
        self._start_secs = self._drawn_secs = time.monotonic()

    def add(self, pairs: int, tasks: int = 0) -> None:
        """Counts pairs and finished tasks; refreshes the bar at most once per `POLL_SECS`."""
        self._pairs += pairs
        now = time.monotonic()
        rate = self._pairs / max(now - self._start_secs, 1e-9)
        self.set_postfix_str(f"{self._pairs:,} pairs, {rate:,.0f} pairs/s", refresh=False)
        self.update(tasks)
        if now - self._drawn_secs >= workers.POLL_SECS:
            self.refresh()
            self._drawn_secs = now


@dataclasses.dataclass(frozen=True)
class CrashSearch:
    """State of the search for pairs that kill a worker; entry numbers include skipped entries.

    Attributes:
        crashed: numbers, from 0, of the entries that kill their worker and are skipped.
        suspects: first and last (exclusive) number of the batch to be tried one by one.
        unexplained: number of deaths that did not lead to a pair.
    """

    crashed: tuple[int, ...] = ()
    suspects: tuple[int, int] | None = None
    unexplained: int = 0

    def after(self, record: dict[str, Any] | None) -> CrashSearch | None:
        """Returns the state after one more death; None to give up the search.

        Args:
            record: the last record of the run; None if the run had not begun a batch.
        """
        if record is not None:
            stage, batch = record["stage"], (record["first"], record["last"])
            if stage == PAIR and len(self.crashed) < _MAX_CRASHED:
                return CrashSearch((*self.crashed, batch[0]), None, self.unexplained)
            if stage == BATCH and self.suspects != batch:
                return dataclasses.replace(self, suspects=batch)
        # Either outside of all pairs, or in a batch whose pairs were harmless one by one.
        if self.unexplained < _MAX_UNEXPLAINED:
            return dataclasses.replace(self, unexplained=self.unexplained + 1)
        return None


@dataclasses.dataclass
class WorkRecord(contextlib.AbstractContextManager["WorkRecord"]):
    """File in which a run records its progress once a worker has died of the shard."""

    output: str  # the file is next to it
    search: CrashSearch | None  # None before the first death: nothing is recorded
    first: int = 0  # number of the next entry

    def begin(self, entries: Sequence[Any], try_one: Callable[[Any], object]) -> list[Any]:
        """Records that a run begins the next entries of its source.

        Args:
            entries: `Skipped`, or objects with a `key`.
            try_one: processes one entry like the run will, without any effect; called for each
                suspect, and may kill this process.

        Returns:
            The entries, with those that killed their worker replaced by `Skipped`.
        """
        found = list(entries)
        if self.search is None:
            return found
        batch = self.first, self.first + len(entries)
        self.first = batch[1]
        for number in set(self.search.crashed) & set(range(*batch)):
            entry = entries[number - batch[0]]
            detail = "the worker process died whenever it worked on it"
            found[number - batch[0]] = Skipped(entry.key, CRASHED, detail)
        if self.search.suspects == batch:
            for number, entry in enumerate(found, batch[0]):
                if not isinstance(entry, Skipped):
                    self._write(PAIR, number, number + 1)
                    try_one(entry)
        self._write(BATCH, *batch)
        return found

    def _write(self, stage: str, first: int, last: int) -> None:
        record = {"stage": stage, "first": first, "last": last}
        files.write_bytes(_record_path(self.output), json.dumps(record).encode())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Removes the file at the end of a run, unless the run ends with `ProcessDeath`."""
        is_death = kind is not None and issubclass(kind, workers.ProcessDeath)
        if self.search is not None and not is_death:
            files.remove(_record_path(self.output))


def _go_on_searching(task: Any, *, may_be_blamed: bool) -> Any:
    """Returns the `ShardTask` to run after its worker died; None to stop retrying."""
    path = _record_path(task.output)
    record = None
    with contextlib.suppress(OSError):
        record = files.read_object(path)
    with contextlib.suppress(OSError):
        files.remove(path)
    if task.search is None or not may_be_blamed:
        return dataclasses.replace(task, search=task.search or CrashSearch())
    search = task.search.after(record)
    if search is None:
        return None
    for number in set(search.crashed) - set(task.search.crashed):
        logging.warning("%s: entry %d ends its worker, and is left out", task.source, number)
    return dataclasses.replace(task, search=search)


def _record_path(output: str) -> str:
    # Named like a temporary file of the output, which makes a later run remove a leftover.
    folder, name = os.path.split(output)
    return files.join(folder, f".{name}.work.0-00000000.tmp")
