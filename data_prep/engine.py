"""Runs shard tasks in local processes, one task at a time in each.

The commands of `data_prep` call `run_tasks`. What a task does, and whether it has to be done, is
not known here.

Workers are spawned, not forked: the parent may have threads. Each has a pipe of its own, and no
lock or queue is shared, so that the death of a worker, at whatever moment, makes nobody wait. The
pool of `concurrent.futures` does not promise that: it loses tasks that are submitted, and workers
that start, while it cleans up after a death.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

from absl import logging
from tqdm import tqdm

_Task = TypeVar("_Task")
_Result = TypeVar("_Result")

Report = Callable[[int], None]
Function = Callable[[Any, Report], Any]

_POLL_SECS = 0.5
_LOG_SECS = 30.0
_STALL_SECS = 300.0
_STOP_SECS = 5.0
_MAX_FAILED_STARTS = 3  # in a row
# The libraries under spaCy and NumPy would start a thread per core in every worker.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

_READY, _PAIRS, _END = "ready", "pairs", "end"  # what a worker tells
_STARTING, _IDLE, _BUSY = "starting", "idle", "at work"  # what it does


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

    A progress bar on stderr shows shards done, their ETA, and pairs per second. A task whose worker
    dies is tried once more when all others are done, alone.

    Args:
        function: importable by its name; calls `report(n)` whenever it has done n more pairs.
        tasks: picklable.
        num_workers: processes; 0 runs in this process, None takes one per core.
        label: of the progress bar.

    Yields:
        One outcome per task, in the order in which they end.

    Raises:
        ValueError: the number of workers is negative.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0))
    if num_workers < 0:
        raise ValueError(f"config.num_workers={num_workers}; expected at least 0")
    if not tasks:
        return
    with _Progress(len(tasks), label) as progress:
        if num_workers == 0:
            outcomes = _run_here(function, tasks, progress)
        else:
            outcomes = _run_in_processes(function, tasks, num_workers, progress)
        for outcome in outcomes:
            progress.advance()
            yield outcome


class _Progress:
    """The bar; `refresh` is called now and then while tasks run."""

    def __init__(self, num_tasks: int, label: str):
        self._pairs = 0
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
        self._pairs += pairs
        self.refresh()

    def refresh(self) -> None:
        if time.monotonic() - self._last_secs >= self._interval_secs:
            self._describe_rate()
            self._bar.refresh()

    def _describe_rate(self) -> None:
        self._last_secs = time.monotonic()
        rate = self._pairs / max(self._last_secs - self._start_secs, 1e-9)
        self._bar.set_postfix_str(f"{self._pairs:,} pairs, {rate:,.0f} pairs/s", refresh=False)


def _run_here(
    function: Function, tasks: Sequence[_Task], progress: _Progress
) -> Iterator[Outcome[_Task, Any]]:
    for task in tasks:
        try:
            yield Outcome(task, function(task, progress.add))
        except Exception as error:
            yield Outcome(task, error=_describe(error))


def _run_in_processes(
    function: Function, tasks: Sequence[_Task], num_workers: int, progress: _Progress
) -> Iterator[Outcome[_Task, Any]]:
    """All tasks; those whose worker died then run alone, with all the memory there is."""
    again = []
    for outcome in _Crew(function, tasks, num_workers, progress).run():
        if isinstance(outcome, _Death) and num_workers > 1:
            logging.warning("%s; its task will run again, alone", outcome.error)
            again.append(outcome.task)
        else:
            yield outcome
    if again:
        yield from _Crew(function, again, 1, progress).run()


class _Death(Outcome[_Task, Any]):
    """The outcome of a task whose worker died."""


@dataclasses.dataclass(eq=False)
class _Worker:
    """A process as the parent sees it; `task` is of a busy one."""

    process: BaseProcess
    pipe: connection.Connection
    state: str = _STARTING
    task: Any = None

    @property
    def is_busy(self) -> bool:
        return self.state == _BUSY

    def receive(self) -> tuple[str, Any, str | None] | None:
        """The next message, or None at the end of the worker; blocks."""
        try:
            data = self.pipe.recv_bytes()
        except (EOFError, OSError):
            return None
        try:
            return pickle.loads(data)
        except Exception as error:
            return _END, None, f"the result cannot be unpickled: {_describe(error)}"

    def describe_end(self) -> str:
        """How the process ended: "exit code 1" or "signal 9, SIGKILL"."""
        self.process.join(_STOP_SECS)
        code = self.process.exitcode
        if code is None or code >= 0:
            return "it closed its pipe" if code is None else f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {-code}, {signal.Signals(-code).name}"
        return f"signal {-code}"


class _Crew:
    """The workers of one run; every one of them has ended when `run` has."""

    def __init__(
        self, function: Function, tasks: Sequence[Any], num_workers: int, progress: _Progress
    ):
        self._function = function
        self._pending = collections.deque(tasks)
        self._num_workers = num_workers
        self._progress = progress
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._last_word_secs = time.monotonic()

    def run(self) -> Iterator[Outcome[Any, Any]]:
        """Yields the outcomes; `_Death` marks a task whose worker died."""
        try:
            while self._pending or self._num_busy():
                wanted = min(self._num_workers, len(self._pending) + self._num_busy())
                while len(self._workers) < wanted:
                    self._workers.append(_start_worker())
                connection.wait([worker.pipe for worker in self._workers], _POLL_SECS)
                self._progress.refresh()
                for worker in list(self._workers):
                    yield from self._attend(worker)
                self._warn_of_stall()
        finally:
            _stop(self._workers)

    def _num_busy(self) -> int:
        return sum(worker.is_busy for worker in self._workers)

    def _attend(self, worker: _Worker) -> Iterator[Outcome[Any, Any]]:
        """Takes one message of a worker, or notices its end."""
        # In this order: all that an ended process has sent is in the pipe.
        has_ended = worker.process.exitcode is not None
        if not worker.pipe.poll():
            if has_ended:
                yield from self._bury(worker)
            return
        message = worker.receive()
        self._last_word_secs = time.monotonic()
        if message is None:
            yield from self._bury(worker)
            return
        kind, value, error = message
        if kind == _PAIRS:
            self._progress.add(value)
            return
        worker.state = _IDLE
        if kind == _END:
            self._failed_starts = 0
            yield Outcome(worker.task, value, error)
        yield from self._give_task(worker)

    def _give_task(self, worker: _Worker) -> Iterator[Outcome[Any, Any]]:
        """Sends the next task that can be sent."""
        while self._pending and not worker.is_busy:
            task = self._pending.popleft()
            try:
                data = pickle.dumps((self._function, task))
            except Exception as error:
                yield Outcome(task, error=f"the task cannot be pickled: {_describe(error)}")
                continue
            worker.task, worker.state = task, _BUSY
            # A worker that has just died is noticed at its pipe.
            with contextlib.suppress(OSError):
                worker.pipe.send_bytes(data)

    def _bury(self, worker: _Worker) -> Iterator[Outcome[Any, Any]]:
        """Accounts for a worker that has ended by itself."""
        end = worker.describe_end()
        self._workers.remove(worker)
        _stop([worker])
        if worker.is_busy:
            yield _Death(
                worker.task,
                error=f"the worker process died at work ({end}): either memory ran out, and fewer "
                "workers (num_workers) may help, or a library crashed; see what it printed above",
            )
            return
        self._failed_starts += 1
        if self._failed_starts < _MAX_FAILED_STARTS:
            return
        error = (
            f"no worker process could start ({end}): either a module cannot be imported, and its "
            "traceback is above, or memory ran out, and fewer workers (num_workers) may help"
        )
        while self._pending:
            yield Outcome(self._pending.popleft(), error=error)

    def _warn_of_stall(self) -> None:
        if time.monotonic() - self._last_word_secs < _STALL_SECS:
            return
        self._last_word_secs = time.monotonic()
        logging.warning(
            "no sign of life from any worker for %.0f s: %s",
            _STALL_SECS,
            ", ".join(
                f"process {worker.process.pid} is {worker.state}" for worker in self._workers
            ),
        )


def _start_worker() -> _Worker:
    pipe, pipe_of_worker = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(pipe_of_worker,), daemon=True
    )
    with _environment(_ONE_THREAD):
        process.start()
    pipe_of_worker.close()  # so that the end of the worker is the end of the pipe
    return _Worker(process, pipe)


def _stop(workers: Sequence[_Worker]) -> None:
    """Idle workers end with their pipe, the others are told to; whoever does not is killed."""
    for worker in workers:
        worker.pipe.close()
        if worker.state != _IDLE:
            worker.process.terminate()
    for worker in workers:
        worker.process.join(_STOP_SECS)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()


def _serve(pipe: connection.Connection) -> None:
    """The life of a worker process: does what comes through the pipe until that is closed."""
    # Ctrl-C reaches all processes of a terminal; the parent decides. As an exception SIGTERM lets
    # half-written files be removed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send_bytes(pickle.dumps((_READY, None, None)))
        while True:
            pipe.send_bytes(_work(pipe.recv_bytes(), _Reporter(pipe)))


def _work(data: bytes, reporter: _Reporter) -> bytes:
    try:
        function, task = pickle.loads(data)
        reply = pickle.dumps((_END, function(task, reporter.add), None))
    except Exception as error:
        reply = pickle.dumps((_END, None, _describe(error)))
    reporter.flush()
    return reply


class _Reporter:
    """Tells the parent how many pairs are done, but not too often."""

    def __init__(self, pipe: connection.Connection):
        self._pipe = pipe
        self._pairs = 0
        self._last_secs = time.monotonic()

    def add(self, pairs: int) -> None:
        self._pairs += pairs
        if time.monotonic() - self._last_secs >= _POLL_SECS:
            self.flush()

    def flush(self) -> None:
        if self._pairs:
            self._pipe.send_bytes(pickle.dumps((_PAIRS, self._pairs, None)))
        self._pairs = 0
        self._last_secs = time.monotonic()


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
