"""Pools of workers: the current process, or processes managed by pebble.

pebble stops tasks at their time limit, and reports the death of a worker as an error of its task
only. Workers are spawned because the parent may have threads. They report pair counts through one
pipe with atomic, short messages, so a dead worker cannot hold a lock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing.context
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from diht_jax.storage.stores import FullError, is_outage

Report = Callable[[int], None]  # called with the number of pairs done since the last call
Function = Callable[[Any, Report], Any]

POLL_SECS = 0.5

# Causes of failures that decide whether and when a task is retried.
STORAGE = "storage"  # a disk, network or store failed for longer than reads are retried
DEATH = "death"  # the worker process died while it ran the task
KILLED = "killed"  # killed from outside while other workers ran, because memory ran out
LOST = "lost"  # the node of the worker is gone
TIMEOUT = "timeout"  # the task exceeded its time limit
FULL = "full"  # no space for the output: other tasks would fail as well
NOT_STARTED = "not started"  # the worker ended before it received the task

_STOP_SECS = 5.0
_MAX_FAILED_STARTS = 3  # consecutive ones
# Otherwise the libraries under spaCy and NumPy start one thread per core in every worker.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_EXITED = 256  # replaces exit code 0, which pebble does not treat as a death and would wait on


class ProcessDeath(OSError):
    """Raised when the input of a task killed a process that it uses; counts as a worker's death."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one task has ended.

    Attributes:
        error: error message; None after success.
        cause: one of the causes above if the task may succeed in another run; None if it will not
            (the input is damaged, or the code has a defect).
    """

    error: str | None = None
    cause: str | None = None

    @classmethod
    def of_error(cls, error: Exception) -> Outcome:
        """Returns the outcome of a task that raised; storage outages may pass later."""
        cause = STORAGE if is_outage(error) else None
        if isinstance(error, FullError | ProcessDeath):
            cause = FULL if isinstance(error, FullError) else DEATH
        return cls(error=describe_error(error), cause=cause)

    @classmethod
    def timed_out(cls, limit_secs: float) -> Outcome:
        """Returns the outcome of a task that was stopped at its time limit."""
        error = f"stopped after config.shard_timeout_secs={limit_secs:g} seconds"
        return cls(error=error, cause=TIMEOUT)


def call_function(function: Function, task: Any, report: Report) -> Outcome:
    """Runs one task in this process; an exception becomes the error of the outcome."""
    try:
        function(task, report)
        return Outcome()
    except Exception as error:
        return Outcome.of_error(error)


def describe_error(error: Exception) -> str:
    """Formats an error for the log: defects with their traceback."""
    if isinstance(error, ValueError | OSError):  # their messages are written for users
        return str(error)
    return "".join(traceback.format_exception(error))


@dataclasses.dataclass
class ThisProcess:
    """Pool that runs tasks in this process, one at a time; defines the methods of all pools."""

    function: Function
    add_pairs: Report
    room = 1  # number of tasks that may run at a time

    def submit(self, task: Any) -> futures.Future:
        """Starts a task; its future is done when the task has ended."""
        future: futures.Future[Outcome] = futures.Future()
        future.set_result(call_function(self.function, task, self.add_pairs))
        return future

    def poll(self) -> None:
        """Checks on running tasks, and counts the pairs that are done."""

    def read(self, future: futures.Future) -> Outcome:
        """Returns the outcome of a task that has ended."""
        return future.result()

    def stop(self) -> None:
        """Ends all workers, busy or idle."""


class _Process(multiprocessing.context.SpawnProcess):
    """Worker process; must run until the pool ends, so any earlier exit counts as a death."""

    @property
    def exitcode(self) -> int | None:
        return _EXITED if (code := super().exitcode) == 0 else code


class _Context(multiprocessing.context.SpawnContext):
    Process = _Process


class LocalPool:
    """Pool of worker processes; same methods as `ThisProcess`."""

    def __init__(
        self, function: Function, num_workers: int, timeout_secs: float | None, add_pairs: Report
    ):
        """Creates the pool; workers start with the first task."""
        try:
            import pebble
        except ImportError as error:
            raise ValueError(
                "worker processes need pebble, which is not installed; run `pip install pebble`, "
                "or install this project with its extra `prep`"
            ) from error
        self.room = num_workers
        self._pebble = pebble
        self._function = function
        self._timeout_secs = timeout_secs
        self._add_pairs = add_pairs
        self._pool: Any = None  # a pebble.ProcessPool
        self._failed_starts = 0
        self._context = _Context()
        self._receiver, self._sender = self._context.Pipe(duplex=False)  # for numbers of pairs
        self._added = [name for name in _ONE_THREAD if name not in os.environ]
        os.environ.update(dict.fromkeys(self._added, "1"))  # inherited by workers

    def submit(self, task: Any) -> futures.Future[Outcome]:
        """Starts a task."""
        if self._pool is not None and not self._pool.active:
            self._stop_workers()  # an idle worker has died
        if self._pool is None:
            self._pool = self._pebble.ProcessPool(
                max_workers=self.room,
                initializer=_begin,
                initargs=(self._sender,),
                context=self._context,
            )
        return self._pool.schedule(_work, (self._function, task), timeout=self._timeout_secs)

    def poll(self) -> None:
        """Counts the pairs that are done."""
        while self._receiver.poll():
            self._add_pairs(int.from_bytes(self._receiver.recv_bytes(), "little"))

    def read(self, future: futures.Future[Outcome]) -> Outcome:
        """Returns the outcome of a task that has ended.

        Raises:
            ValueError: no worker can start.
        """
        error = future.exception()
        if isinstance(error, BrokenProcessPool):  # raised for all tasks of the pool
            if self._pool is not None and not self._pool.active:
                self._stop_workers()
                self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                raise ValueError(
                    "no worker process could start: either a module cannot be imported, and its "
                    "traceback is above, or memory ran out, and fewer workers (num_workers) may "
                    "help"
                )
            return Outcome(error="its worker process could not start", cause=NOT_STARTED)
        self._failed_starts = 0
        if isinstance(error, self._pebble.ProcessExpired):
            return self._died(error.exitcode)
        if isinstance(error, TimeoutError) and self._timeout_secs is not None:
            return Outcome.timed_out(self._timeout_secs)
        return Outcome.of_error(error) if isinstance(error, Exception) else future.result()

    def _died(self, code: int) -> Outcome:
        end = f"exit code {code % _EXITED}"
        if code < 0:
            end = f"signal {-code}"
            with contextlib.suppress(ValueError):
                end += f", {signal.Signals(-code).name}"
        # The kernel kills the largest process when memory runs out.
        is_shared = code == -signal.SIGKILL and self.room > 1
        return Outcome(
            error=f"the worker process died at work ({end}): either memory ran out, and fewer "
            "workers (num_workers) may help, or a library crashed; see what it printed above",
            cause=KILLED if is_shared else DEATH,
        )

    def narrow(self) -> None:
        """Continues with one worker; the others end and release their memory."""
        self.room = 1
        self._stop_workers()

    def stop(self) -> None:
        """Ends all workers, busy or idle."""
        self._stop_workers()
        for name in self._added:
            os.environ.pop(name, None)

    def _stop_workers(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        pool.stop()
        for process in multiprocessing.active_children():  # all at once instead of one by one
            if process.name == self._pebble.pool.process.WORKERS_NAME:
                process.terminate()
        pool.join()


_sender: connection.Connection | None = None  # set in worker processes only


def _begin(sender: connection.Connection) -> None:
    """Prepares a worker process."""
    global _sender
    _sender = sender
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _leave(*_: Any) -> None:
    """Exits a worker with an exception, which removes half-written files."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_with_parent() -> None:
    """Ends this process if the parent is killed, because another run may begin."""
    if (parent := multiprocessing.parent_process()) is not None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_STOP_SECS)
        os._exit(1)


def _work(function: Function, task: Any) -> Outcome:
    """Runs one task in a worker process."""
    pairs, sent_secs = 0, time.monotonic()

    def report(count: int, *, is_end: bool = False) -> None:
        """Reports the number of pairs to the parent, at most once per `POLL_SECS`."""
        nonlocal pairs, sent_secs
        pairs += count
        if pairs and _sender is not None and (is_end or time.monotonic() - sent_secs >= POLL_SECS):
            _sender.send_bytes(pairs.to_bytes(8, "little"))
            pairs, sent_secs = 0, time.monotonic()

    try:
        outcome = call_function(function, task, report)
    except SystemExit:  # pebble would treat it as an error of the task
        os._exit(1)
    report(0, is_end=True)
    return outcome
