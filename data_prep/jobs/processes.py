"""Tasks in processes of this machine: pebble's pool, and what a shard job asks of its workers.

The pool stops tasks at their time limit, and the death of a worker is an error of its task alone.
Workers are spawned, since the parent may have threads. They count their pairs through one pipe,
whose short messages are written as a whole; no lock is shared that a dead worker could hold.
"""

from __future__ import annotations

import contextlib
import multiprocessing.context
import os
import pickle
import signal
import sys
import threading
import time
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

from data_prep.jobs.outcome import (
    DEATH,
    KILLED,
    NOT_STARTED,
    POLL_SECS,
    Function,
    Outcome,
    Report,
    call_function,
    describe_error,
    failed_outcome,
    timed_out,
)

_STOP_SECS = 5.0
_MAX_FAILED_STARTS = 3  # in a row
# The libraries under spaCy and NumPy would start a thread per core in every worker.
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


_EXITED = 256  # stands for exit code 0, which pebble takes for no death


class _Process(multiprocessing.context.SpawnProcess):
    """A worker; it ends only with the pool, so that any other end of it is a death."""

    @property
    def exitcode(self) -> int | None:
        code = super().exitcode
        return _EXITED if code == 0 else code


class _Context(multiprocessing.context.SpawnContext):
    Process = _Process


class LocalPool:
    """Worker processes; see `engine.ThisProcess`."""

    def __init__(
        self, function: Function, num_workers: int, timeout_secs: float | None, add_pairs: Report
    ):
        """Starts no worker before there is a task."""
        self.room = num_workers
        self._pebble = _import_pebble()
        self._function = function
        self._timeout_secs = timeout_secs
        self._add_pairs = add_pairs
        self._pool: Any = None  # a pebble.ProcessPool
        self._failed_starts = 0
        self._context = _Context()
        self._receiver, self._sender = self._context.Pipe(duplex=False)  # of numbers of pairs
        self._added = [name for name in _ONE_THREAD if name not in os.environ]
        os.environ.update(dict.fromkeys(self._added, "1"))  # which workers inherit

    def submit(self, task: Any) -> futures.Future[bytes]:
        """Starts a task."""
        try:
            data = pickle.dumps((self._function, task))
        except Exception as error:
            text = f"the task cannot be pickled: {describe_error(error)}"
            future: futures.Future[bytes] = futures.Future()
            future.set_result(pickle.dumps(Outcome(error=text)))
            return future
        if self._pool is not None and not self._pool.active:
            self._stop_workers()  # an idle worker has died
        if self._pool is None:
            self._pool = self._pebble.ProcessPool(
                max_workers=self.room,
                initializer=_begin,
                initargs=(self._sender,),
                context=self._context,
            )
        return self._pool.schedule(_work, (data,), timeout=self._timeout_secs)

    def poll(self) -> None:
        """Counts the pairs that are done."""
        while self._receiver.poll():
            self._add_pairs(int.from_bytes(self._receiver.recv_bytes(), "little"))

    def read(self, future: futures.Future[bytes]) -> Outcome:
        """The outcome of a task that has ended.

        Raises:
            ValueError: no worker can start.
        """
        error = future.exception()
        if isinstance(error, BrokenProcessPool):
            self._replace_workers()
            return Outcome(error="its worker process could not start", cause=NOT_STARTED)
        self._failed_starts = 0
        if isinstance(error, self._pebble.ProcessExpired):
            return self._died(error.exitcode)
        if isinstance(error, TimeoutError) and self._timeout_secs is not None:
            return timed_out(self._timeout_secs)
        try:
            return pickle.loads(future.result())
        except Exception as error:
            return Outcome(error=f"the result cannot be unpickled: {describe_error(error)}")

    def _died(self, code: int) -> Outcome:
        end = f"exit code {code % _EXITED}"
        if code < 0:
            end = f"signal {-code}"
            with contextlib.suppress(ValueError):
                end += f", {signal.Signals(-code).name}"
        # The kernel kills the largest process when the memory of all of them runs out.
        is_shared = code == -signal.SIGKILL and self.room > 1
        return Outcome(
            error=f"the worker process died at work ({end}): either memory ran out, and fewer "
            "workers (num_workers) may help, or a library crashed; see what it printed above",
            cause=KILLED if is_shared else DEATH,
        )

    def _replace_workers(self) -> None:
        """Ends the workers where one has ended before any had a task, once for all their tasks."""
        if self._pool is None or self._pool.active:
            return
        self._stop_workers()
        self._failed_starts += 1
        if self._failed_starts >= _MAX_FAILED_STARTS:
            raise ValueError(
                "no worker process could start: either a module cannot be imported, and its "
                "traceback is above, or memory ran out, and fewer workers (num_workers) may help"
            )

    def narrow(self) -> None:
        """Goes on with one worker; the others end, and give their memory back."""
        self.room = 1
        self._stop_workers()

    def stop(self) -> None:
        """Ends all workers, at work or not."""
        self._stop_workers()
        for name in self._added:
            os.environ.pop(name, None)

    def _stop_workers(self) -> None:
        pool, self._pool = self._pool, None
        if pool is None:
            return
        pool.stop()
        for process in multiprocessing.active_children():  # at once, not one after the other
            if process.name == self._pebble.pool.process.WORKERS_NAME:
                process.terminate()
        pool.join()


_sender: connection.Connection | None = None  # of this process, if it is a worker


def _begin(sender: connection.Connection) -> None:
    """Prepares a worker process."""
    global _sender
    _sender = sender
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _leave(*_: Any) -> None:
    """Ends a worker by an exception, so that half-written files are removed."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _end_with_parent() -> None:
    """Ends this process when the parent was killed: another run may begin."""
    parent = multiprocessing.parent_process()
    if parent is None:  # not a worker
        return
    connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_STOP_SECS)
    os._exit(1)


def _work(data: bytes) -> bytes:
    """Does one task; returns its outcome. Both are pickled here: a fault in that is the task's."""
    counter = _PairCounter()
    try:
        function, task = pickle.loads(data)
        reply = pickle.dumps(call_function(function, task, counter.add))
    except Exception as error:
        reply = pickle.dumps(failed_outcome(error))
    except SystemExit:
        os._exit(1)
    counter.send()
    return reply


class _PairCounter:
    """Tells the parent how many pairs are done, but not too often."""

    def __init__(self) -> None:
        self._pairs = 0
        self._last_secs = time.monotonic()

    def add(self, pairs: int) -> None:
        self._pairs += pairs
        if time.monotonic() - self._last_secs >= POLL_SECS:
            self.send()

    def send(self) -> None:
        if self._pairs and _sender is not None:
            _sender.send_bytes(self._pairs.to_bytes(8, "little"))
        self._pairs = 0
        self._last_secs = time.monotonic()


def _import_pebble() -> Any:
    try:
        import pebble
    except ImportError as error:
        raise ValueError(
            "worker processes need pebble, which is not installed; run `pip install pebble`, or "
            "install this project with its extra `prep`"
        ) from error
    return pebble
