"""Runs shard tasks in local processes, one task at a time in each.

Workers are spawned, not forked: the parent may have threads. Each has a pipe of its own, and no
lock or queue is shared, so that the death of a worker, at whatever moment, makes nobody wait. The
pool of `concurrent.futures` does not promise that: it loses tasks that are submitted, and workers
that start, while it cleans up after a death.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from typing import Any

from absl import logging

from data_prep.jobs.progress import (
    DEATH,
    KILLED,
    POLL_SECS,
    Function,
    Outcome,
    Progress,
    TaskQueue,
    call_function,
    describe_error,
    failed_outcome,
    timed_out,
)

_STALL_SECS = 300.0
_STOP_SECS = 5.0
_MAX_FAILED_STARTS = 3  # in a row
# The libraries under spaCy and NumPy would start a thread per core in every worker.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

# Messages of a worker: (_READY, None), (_PAIRS, number of them), (_END, outcome without its task).
_READY, _PAIRS, _END = "ready", "pairs", "end"
_STARTING, _IDLE, _BUSY = "starting", "idle", "at work"  # states of a worker

_now = time.monotonic  # tests put their own clock here


@dataclasses.dataclass(eq=False)
class _Worker:
    """A process as the parent sees it; `task`, and when it began, are of a busy one."""

    process: BaseProcess
    pipe: connection.Connection
    state: str = _STARTING
    task: Any = None
    began_secs: float = 0.0

    @property
    def is_busy(self) -> bool:
        return self.state == _BUSY

    def receive(self) -> tuple[str, Any] | None:
        """The next message, or None at the end of the worker; blocks."""
        try:
            data = self.pipe.recv_bytes()
        except (EOFError, OSError):
            return None
        try:
            return pickle.loads(data)
        except Exception as error:
            text = f"the result cannot be unpickled: {describe_error(error)}"
            return _END, Outcome(None, error=text)

    def exit_code(self) -> int | None:
        """Of a process that has ended; negative is the number of a signal."""
        self.process.join(_STOP_SECS)
        return self.process.exitcode

    def describe_end(self) -> str:
        """How the process ended: "exit code 1" or "signal 9, SIGKILL"."""
        code = self.exit_code()
        if code is None or code >= 0:
            return "it closed its pipe" if code is None else f"exit code {code}"
        with contextlib.suppress(ValueError):
            return f"signal {-code}, {signal.Signals(-code).name}"
        return f"signal {-code}"


class LocalWorkerPool:
    """The worker processes of one run; every one of them has ended when `run` has."""

    def __init__(
        self,
        function: Function,
        tasks: TaskQueue,
        num_workers: int,
        progress: Progress,
        timeout_secs: float | None = None,
    ):
        """Of a queue of tasks; more may be put into it whenever an outcome is yielded."""
        self._function = function
        self._pending = tasks
        self._timeout_secs = timeout_secs
        self._num_workers = num_workers
        self._progress = progress
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._last_message_secs = time.monotonic()

    def run(self) -> Iterator[Outcome[Any, Any]]:
        """Yields the outcomes, in the order in which they come."""
        try:
            while self._pending or self._num_busy():
                wanted = min(self._num_workers, len(self._pending) + self._num_busy())
                while len(self._workers) < wanted:
                    self._workers.append(_start_worker())
                for worker in self._workers:
                    if worker.state == _IDLE:  # for a task that came back to the queue
                        yield from self._give_task(worker)
                connection.wait([worker.pipe for worker in self._workers], POLL_SECS)
                self._progress.refresh()
                for worker in list(self._workers):
                    yield from self._handle_message(worker)
                yield from self._stop_overdue()
                self._warn_of_stall()
        finally:
            _stop(self._workers)

    def _num_busy(self) -> int:
        return sum(worker.is_busy for worker in self._workers)

    def _handle_message(self, worker: _Worker) -> Iterator[Outcome[Any, Any]]:
        """Takes one message of a worker, or notices its end."""
        # In this order: all that an ended process has sent is in the pipe.
        has_ended = worker.process.exitcode is not None
        if not worker.pipe.poll():
            if has_ended:
                yield from self._handle_exit(worker)
            return
        message = worker.receive()
        self._last_message_secs = time.monotonic()
        if message is None:
            yield from self._handle_exit(worker)
            return
        kind, value = message
        if kind == _PAIRS:
            self._progress.add(value)
            return
        worker.state = _IDLE
        if kind == _END:
            self._failed_starts = 0
            yield dataclasses.replace(value, task=worker.task)
        yield from self._give_task(worker)

    def _give_task(self, worker: _Worker) -> Iterator[Outcome[Any, Any]]:
        """Sends the next task that can be sent."""
        while self._pending and not worker.is_busy:
            task = self._pending.popleft()
            try:
                data = pickle.dumps((self._function, task))
            except Exception as error:
                yield Outcome(task, error=f"the task cannot be pickled: {describe_error(error)}")
                continue
            worker.task, worker.state, worker.began_secs = task, _BUSY, _now()
            # A worker that has just died is noticed at its pipe.
            with contextlib.suppress(OSError):
                worker.pipe.send_bytes(data)

    def _handle_exit(self, worker: _Worker) -> Iterator[Outcome[Any, Any]]:
        """Accounts for a worker that has ended by itself."""
        end, was_killed = worker.describe_end(), worker.exit_code() == -signal.SIGKILL
        self._workers.remove(worker)
        _stop([worker])
        if worker.is_busy:
            yield Outcome(
                worker.task,
                error=f"the worker process died at work ({end}): either memory ran out, and fewer "
                "workers (num_workers) may help, or a library crashed; see what it printed above",
                # The kernel kills whoever holds most when the memory of all of them ran out.
                cause=KILLED if was_killed and self._num_workers > 1 else DEATH,
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

    def _stop_overdue(self) -> Iterator[Outcome[Any, Any]]:
        """Stops the workers whose task takes longer than it may."""
        if self._timeout_secs is None:
            return
        for worker in list(self._workers):
            secs = _now() - worker.began_secs
            if worker.is_busy and secs > self._timeout_secs and not worker.pipe.poll():
                self._workers.remove(worker)
                _stop([worker])
                yield timed_out(worker.task, secs, self._timeout_secs)

    def _warn_of_stall(self) -> None:
        if time.monotonic() - self._last_message_secs < _STALL_SECS:
            return
        self._last_message_secs = time.monotonic()
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
    """Closes the pipes, which ends idle workers; terminates the others, and kills in the end."""
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
    """Runs in a worker process: does the tasks that come through the pipe until it is closed."""
    # Ctrl-C reaches all processes of a terminal; the parent decides. As an exception SIGTERM lets
    # half-written files be removed.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send_bytes(pickle.dumps((_READY, None)))
        while True:
            pipe.send_bytes(_work(pipe.recv_bytes(), _Reporter(pipe)))


def _end_with_parent(parent: int) -> None:
    """Ends this process when the parent was killed: nobody listens, and another run may begin."""
    while os.getppid() == parent:
        time.sleep(POLL_SECS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_SECS)
    os._exit(1)


def _work(data: bytes, reporter: _Reporter) -> bytes:
    """Does one task; returns the message with its outcome."""
    try:
        function, task = pickle.loads(data)
        outcome = call_function(function, task, reporter.add)
        reply = pickle.dumps((_END, dataclasses.replace(outcome, task=None)))
    except Exception as error:
        reply = pickle.dumps((_END, failed_outcome(None, error)))
    reporter.flush()
    return reply


class _Reporter:
    """Reports to the parent how many pairs are done, but not too often."""

    def __init__(self, pipe: connection.Connection):
        self._pipe = pipe
        self._pairs = 0
        self._last_secs = time.monotonic()

    def add(self, pairs: int) -> None:
        self._pairs += pairs
        if time.monotonic() - self._last_secs >= POLL_SECS:
            self.flush()

    def flush(self) -> None:
        if self._pairs:
            self._pipe.send_bytes(pickle.dumps((_PAIRS, self._pairs)))
        self._pairs = 0
        self._last_secs = time.monotonic()


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
