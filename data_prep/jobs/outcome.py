"""Outcomes of tasks: results, errors, and causes that may pass; the same in every engine."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from typing import Any

from diht_jax.storage.retries import FullError, is_outage

Report = Callable[[int], None]
Function = Callable[[Any, Report], Any]

POLL_SECS = 0.5

# Why a task failed, where that says what to do next.
STORAGE = "storage"  # a disk, a network or a store has failed for longer than a read was tried
DEATH = "death"  # the worker process ended while it was at work
KILLED = "killed"  # from outside while others were at work: memory ran out
LOST = "lost"  # the node of the worker is gone
TIMEOUT = "timeout"  # the task took longer than it may
FULL = "full"  # there is no room for the output: other tasks would fail of it as well
NOT_STARTED = "not started"  # the worker has ended before it had the task


class ProcessDeath(OSError):
    """A process that a task needed has died of what it was given to do, as a worker may."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Result or error of one task.

    Attributes:
        task: the task; None before the engine has added it.
        result: what the function returned; None after an error.
        error: what went wrong; None after success.
        cause: why the error may pass when the task is run again, one of the above; None where it
            will not: the input is damaged, or the code has a defect.
    """

    task: Any = None
    result: Any = None
    error: str | None = None
    cause: str | None = None


def call_function(function: Function, task: Any, report: Report) -> Outcome:
    """Does one task in this process; an exception becomes the error of the outcome."""
    try:
        return Outcome(result=function(task, report))
    except Exception as error:
        return failed_outcome(error)


def failed_outcome(error: Exception) -> Outcome:
    """The outcome of a task that raised; an outage of a disk or a store may pass later."""
    cause = STORAGE if is_outage(error) else None
    if isinstance(error, FullError):
        cause = FULL
    if isinstance(error, ProcessDeath):
        cause = DEATH
    return Outcome(error=describe_error(error), cause=cause)


def timed_out(limit_secs: float) -> Outcome:
    """The outcome of a task that was stopped after some time."""
    return Outcome(
        error=f"stopped after config.shard_timeout_secs={limit_secs:g} seconds",
        cause=TIMEOUT,
    )


def describe_error(error: Exception) -> str:
    """The error for the person who reads the log."""
    # Messages of these are written for people; anything else is a defect, which needs a traceback.
    if isinstance(error, ValueError | OSError):
        return str(error)
    return "".join(traceback.format_exception(error))
