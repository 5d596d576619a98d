"""Threads that simulate the processes of a job."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any


class Processes:
    """Simulated processes with a blocking all-gather.

    Attributes:
        own: thread-local; its `index` is the index of the calling process.
    """

    def __init__(self, count: int):
        self.count, self.own = count, threading.local()
        self._given: list[Any] = [None] * count
        self._barrier = threading.Barrier(count, timeout=60)

    def exchange(self, value: Any) -> list[Any]:
        """Returns the values of all processes, once each has called this."""
        self._given[self.own.index] = value
        self._barrier.wait()
        found = list(self._given)
        self._barrier.wait()
        return found

    def run(self, work: Callable[[], Any]) -> list[Any]:
        """Returns the result of `work` in each process."""

        def start(index: int) -> Any:
            self.own.index = index
            return work()

        with concurrent.futures.ThreadPoolExecutor(self.count) as threads:
            return list(threads.map(start, range(self.count)))
