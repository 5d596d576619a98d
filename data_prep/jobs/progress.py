"""One call of a task's function and its outcome, and the progress bar: the same in every engine.

How tasks are distributed belongs in `engine_local.py` and `engine_ray.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from diht_jax.progress import ProgressBar
from diht_jax.storage.retries import is_outage, is_storage_failure

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

Report = Callable[[int], None]
Function = Callable[[Any, Report], Any]

POLL_SECS = 0.5

# Why a task failed although it may succeed when it is run again.
STORAGE = "storage"  # a disk, a network or a store has failed for longer than a read was tried
REFUSED = "refused"  # the system or a store refused something, which waiting seldom changes
DEATH = "death"  # the worker process ended while it was at work
KILLED = "killed"  # from outside while others were at work: memory ran out
LOST = "lost"  # the node of the worker is gone
TIMEOUT = "timeout"  # the task took longer than it may


now, sleep = time.monotonic, time.sleep  # of delayed tasks; tests put their own clock here


class ProcessDeath(OSError):
    """A process that a task needed has died of what it was given to do, as a worker may."""


@dataclasses.dataclass(frozen=True)
class Outcome(Generic[_Task, _Result]):
    """How one task ended.

    Attributes:
        task: the task.
        result: what the function returned; None after an error.
        error: what went wrong; None after success.
        cause: of an error that may pass when the task is run again, one of the above; None where
            it will not: the input is damaged, or the code has a defect.
    """

    task: _Task
    result: _Result | None = None
    error: str | None = None
    cause: str | None = None


class TaskQueue:
    """The tasks that wait for a worker; those that are run again are put among the others."""

    def __init__(self, tasks: Sequence[Any]):
        """Takes one after the other of `tasks`, so that a sequence may make them as they come."""
        self._rest = iter(tasks)
        self._num_rest = len(tasks)
        self._front: collections.deque[Any] = collections.deque()
        self._delayed: list[tuple[float, int, Any]] = []  # a heap: when, and in which order
        self._num_delays = 0

    def __len__(self) -> int:
        """How many can be taken now: without those that are delayed."""
        self._take_due()
        return len(self._front) + self._num_rest

    def popleft(self) -> Any:
        """The next task, which is taken out; IndexError where there is none."""
        self._take_due()
        if self._front or not self._num_rest:
            return self._front.popleft()
        self._num_rest -= 1
        return next(self._rest)

    def insert(self, index: int, task: Any) -> None:
        """Puts a task behind `index` others, or at the end where there are fewer."""
        while len(self._front) < index and self._num_rest:
            self._num_rest -= 1
            self._front.append(next(self._rest))
        self._front.insert(index, task)

    def insert_later(self, delay_secs: float, task: Any) -> None:
        """Puts a task among the others once some time has passed."""
        self._num_delays += 1
        heapq.heappush(self._delayed, (now() + delay_secs, self._num_delays, task))

    def _take_due(self) -> None:
        while self._delayed and self._delayed[0][0] <= now():
            self._front.append(heapq.heappop(self._delayed)[2])

    def wait(self) -> bool:
        """Waits until a delayed task can be taken; False where none is delayed."""
        if not self._delayed:
            return False
        while not self:
            sleep(max(self._delayed[0][0] - now(), 0))
        return True


def call_function(function: Function, task: _Task, report: Report) -> Outcome[_Task, Any]:
    """Does one task in this process; an exception becomes the error of the outcome."""
    try:
        return Outcome(task, function(task, report))
    except Exception as error:
        return failed_outcome(task, error)


def failed_outcome(task: _Task, error: Exception) -> Outcome[_Task, Any]:
    """The outcome of a task that raised; what a disk or a store refused may pass later."""
    cause = None
    if isinstance(error, OSError) or is_storage_failure(error):
        cause = STORAGE if is_outage(error) else REFUSED
    if isinstance(error, ProcessDeath):
        cause = DEATH
    return Outcome(task, error=describe_error(error), cause=cause)


def timed_out(task: _Task, secs: float, limit_secs: float) -> Outcome[_Task, Any]:
    """The outcome of a task that was stopped after some time."""
    error = f"stopped after {secs:.0f} s, since config.shard_timeout_secs={limit_secs:g}"
    return Outcome(task, error=error, cause=TIMEOUT)


class Progress:
    """The bar; `refresh` is called now and then while tasks run."""

    def __init__(self, num_tasks: int, label: str):
        self._pairs = 0
        self._bar = ProgressBar(total=num_tasks, desc=label, unit="shard", dynamic_ncols=True)
        self._start_secs = self._last_secs = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._describe_rate()
        self._bar.close()

    def advance(self) -> None:
        """Counts a task that has ended."""
        self._describe_rate()
        self._bar.update(1)

    def add(self, pairs: int) -> None:
        """Counts pairs that are done."""
        self._pairs += pairs
        self.refresh()

    def refresh(self) -> None:
        """Draws the bar, if it was not drawn for some time."""
        if time.monotonic() - self._last_secs >= POLL_SECS:
            self._describe_rate()
            self._bar.refresh()

    def _describe_rate(self) -> None:
        self._last_secs = time.monotonic()
        rate = self._pairs / max(self._last_secs - self._start_secs, 1e-9)
        self._bar.set_postfix_str(f"{self._pairs:,} pairs, {rate:,.0f} pairs/s", refresh=False)


def describe_error(error: Exception) -> str:
    """The error for the person who reads the log."""
    # Messages of these are written for people; anything else is a defect, which needs a traceback.
    if isinstance(error, ValueError | OSError):
        return str(error)
    return "".join(traceback.format_exception(error))
