"""Requests to an object store: several at a time, tried again, and hedged where no answer comes.

A request that fails is sent again after a pause that doubles. One that takes far longer than others
did is sent a second time, and the first answer counts. Requests run in threads of their own, since
nobody can end a thread that a library never returns to.
"""

from __future__ import annotations

import collections
import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import numpy as np

from diht_jax.storage.retries import StorageError, is_missing

_Result = TypeVar("_Result")

# Paused after the first failure and at most; about half of it at random, as hosts fail together.
_FIRST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.1, 5.0
# A request is hedged after `_HEDGE_FACTOR` times the 95th percentile of the last answers' time.
_HEDGE_FACTOR, _HEDGE_SECS, _LAST_ANSWERS = 3.0, 1.0, 256
# As long as too few answers have come to know.
_FEW_ANSWERS, _HEDGE_FIRST_SECS = 8, 10.0
# Requests for the same thing that may be without an answer at once.
_MAX_ATTEMPTS = 4
# Errors that no waiting ends. Others are tried again: every store has its own classes of them.
_FINAL = (PermissionError, TypeError, AttributeError, ImportError, NotImplementedError)


@dataclasses.dataclass
class _Fetch:
    """What was requested, and how that goes."""

    began: float
    attempted: float = 0.0
    running: int = 0
    failures: int = 0
    retry_at: float | None = None
    last_error: BaseException | None = None
    is_taken: bool = False


@dataclasses.dataclass
class _Answer:
    """What became of one request."""

    is_first: bool = False
    secs: float = 0.0
    error: BaseException | None = None


class Fetcher:
    """Requests that are under way.

    Attributes:
        requests: sent so far.
        failed_requests, hedged_requests: those that failed; those sent for lack of an answer.
        last_error: of the last request that failed, as a text.
    """

    def __init__(
        self,
        request: Callable[[Any], bytes],
        finish: Callable[[Any, bytes], None],
        *,
        describe: Callable[[Any], str],
        timeout_secs: float,
        clock: Callable[[], float] = time.monotonic,
        start: Callable[[Callable[[], None]], None] | None = None,
        jitter: Callable[[], float] = random.random,
    ):
        """Requests nothing yet.

        Args:
            request: key -> bytes; called in a thread, maybe several times for a key.
            finish: what becomes of the first answer for a key; called in a thread, once.
            describe: key -> its URL, for messages.
            timeout_secs: after which a key without an answer ends in a StorageError.
            clock: seconds.
            start: runs a function in a new thread.
            jitter: random, in [0, 1).
        """
        self._request = request
        self._finish = finish
        self._describe = describe
        self._timeout_secs = timeout_secs
        self._clock = clock
        self._start = start or _start_thread
        self._jitter = jitter
        self._fetches: dict[Hashable, _Fetch] = {}
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        self._times: collections.deque[float] = collections.deque(maxlen=_LAST_ANSWERS)
        self._lock = threading.Lock()
        self.requests = self.failed_requests = self.hedged_requests = 0
        self.last_error = ""

    def __len__(self) -> int:
        """Keys without an answer."""
        return len(self._fetches)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._fetches

    def fetch(self, key: Hashable) -> None:
        """Begins to fetch a key."""
        fetch = self._fetches[key] = _Fetch(self._clock())
        self._attempt(key, fetch)

    def poll(self, wait_secs: float) -> list[Any]:
        """Takes answers, and sends again what has failed or lacks an answer.

        Args:
            wait_secs: to wait at most for an answer.

        Returns:
            The keys that are finished.

        Raises:
            StorageError: a key cannot be read; names its URL.
            Exception: what `finish` raised.
        """
        finished = []
        while True:
            try:
                key, fetch, answer = self._answers.get(timeout=wait_secs)
            except queue.Empty:
                break
            wait_secs = 0.0
            fetch.running -= 1
            if answer.is_first:
                if answer.error is not None:
                    raise answer.error
                self._times.append(answer.secs)
                del self._fetches[key]
                finished.append(key)
            elif not fetch.is_taken:  # otherwise another request was faster
                self._handle_error(key, fetch, answer.error)
        for key, fetch in self._fetches.items():
            self._try_again(key, fetch)
        return finished

    def _attempt(self, key: Hashable, fetch: _Fetch) -> None:
        began = fetch.attempted = self._clock()
        fetch.retry_at = None
        fetch.running += 1
        self.requests += 1

        def run() -> None:
            answer = _Answer()
            try:
                data = self._request(key)
                answer.secs = self._clock() - began
                with self._lock:
                    answer.is_first, fetch.is_taken = not fetch.is_taken, True
                if answer.is_first:
                    self._finish(key, data)
            except BaseException as error:
                answer.error = error
            self._answers.put((key, fetch, answer))

        self._start(run)

    def _handle_error(self, key: Hashable, fetch: _Fetch, error: BaseException) -> None:
        fetch.failures += 1
        fetch.last_error = error
        self.failed_requests += 1
        self.last_error = f"{self._describe(key)}: {_text_of(error)}"
        if _is_final(error):
            raise self._storage_error(key, fetch) from error
        if not fetch.running:
            fetch.retry_at = self._clock() + _pause_secs(fetch.failures, self._jitter())

    def _try_again(self, key: Hashable, fetch: _Fetch) -> None:
        now = self._clock()
        if fetch.is_taken:
            return
        if now - fetch.began >= self._timeout_secs:
            raise self._storage_error(key, fetch) from fetch.last_error
        if fetch.retry_at is not None:
            if now >= fetch.retry_at:
                self._attempt(key, fetch)
        elif fetch.running < _MAX_ATTEMPTS and (
            now - fetch.attempted >= self._hedge_secs() * 2 ** (fetch.running - 1)
        ):
            self.hedged_requests += 1
            self._attempt(key, fetch)

    def _hedge_secs(self) -> float:
        if len(self._times) < _FEW_ANSWERS:
            return _HEDGE_FIRST_SECS
        return max(_HEDGE_SECS, _HEDGE_FACTOR * float(np.percentile(self._times, 95)))

    def _storage_error(self, key: Hashable, fetch: _Fetch) -> StorageError:
        reason = _text_of(fetch.last_error) if fetch.last_error else "no answer came"
        return StorageError(
            f"{self._describe(key)}: could not be read in {self._clock() - fetch.began:.0f} s and "
            f"{fetch.failures + fetch.running} requests ({reason}); its contents may be good: look "
            "at the network, the store's status and the credentials, and run the command again; "
            "config.data.read_timeout_secs has how long a store may fail"
        )


def try_patiently(
    read: Callable[[], _Result],
    timeout_secs: float,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> _Result:
    """Calls a function until it succeeds, with pauses as of `Fetcher`.

    Args:
        read: sends a request.
        timeout_secs: after which its error is raised.
        clock, sleep: in seconds.
    """
    began, failures = clock(), 0
    while True:
        try:
            return read()
        except Exception as error:
            failures += 1
            if _is_final(error) or isinstance(error, ValueError | IndexError):
                raise
            if clock() - began >= timeout_secs:
                raise
        sleep(_pause_secs(failures, random.random()))


def _pause_secs(failures: int, jitter: float) -> float:
    longest = _FIRST_PAUSE_SECS * 2 ** min(failures - 1, 16)
    return min(_LONGEST_PAUSE_SECS, longest) * (0.5 + 0.5 * jitter)


def _is_final(error: BaseException) -> bool:
    return isinstance(error, _FINAL) or (isinstance(error, OSError) and _is_gone(error))


def _is_gone(error: OSError) -> bool:
    """Whether there is no such file; some libraries set no number."""
    return isinstance(error, FileNotFoundError | IsADirectoryError) or is_missing(error)


def _text_of(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _start_thread(run: Callable[[], None]) -> None:
    threading.Thread(target=run, name="fetch_block", daemon=True).start()
