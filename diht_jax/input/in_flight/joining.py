"""Batches joined from sub-batches, one batch ahead and in memory that is used again.

A host's batch may have ten gigabytes. The kernel clears every page of new memory at its first use,
which takes longer than the copy; so the memory of a batch is lent, and comes back once nothing
refers to its arrays any more: neither a caller, nor a view, nor a transfer to a device, nor an
array of JAX on the CPU, which may be a view of what it was made of. All of these hold references.

While the devices take a batch, a thread joins the next one.
"""

from __future__ import annotations

import collections
import itertools
import math
import mmap
import threading
import weakref
from collections.abc import Callable
from concurrent import futures
from typing import Any

import numpy as np

# Threads that copy sub-batches into their batch. One thread would copy about as fast as eight GPUs
# train. A copy does not hold the interpreter's lock.
COPYING_THREADS = 4
# Batches of this process in addition to the workers': one is joined, one goes to the devices.
JOINED_BATCHES = 2
# How often a thread that joins ahead looks for memory that has come back.
_LOOK_SECS = 0.005
# How long the end of such a thread is awaited: it waits for a sub-batch that is being decoded.
_END_SECS = 5.0


class BatchMemory:
    """Memory of joined batches, lent out as arrays."""

    def __init__(self):
        # Changed by a single operation each, since a loan may end in any thread.
        self._free: collections.deque[dict[str, np.ndarray]] = collections.deque()
        self._loans: set[int] = set()
        self._numbers = itertools.count()

    def is_short(self) -> bool:
        """Returns whether as many batches are in use as there should be at a time."""
        return len(self._loans) >= JOINED_BATCHES

    def lend(self, part: dict[str, np.ndarray], num_parts: int) -> dict[str, np.ndarray]:
        """Uninitialised arrays for `num_parts` parts like `part`, [num_parts * rows, ...] each."""
        forms = {
            name: ((num_parts * len(array), *array.shape[1:]), array.dtype)
            for name, array in part.items()
        }
        try:
            owned = self._free.pop()
        except IndexError:
            owned = {}
        if {name: (array.shape, array.dtype) for name, array in owned.items()} != forms:
            owned = {name: _empty_aligned(*form) for name, form in forms.items()}
        loan, number = _Loan(), next(self._numbers)
        self._loans.add(number)
        weakref.finalize(loan, self._take_back, number, owned).atexit = False
        return {name: np.asarray(_Lent(loan, array)) for name, array in owned.items()}

    def _take_back(self, number: int, owned: dict[str, np.ndarray]) -> None:
        self._loans.discard(number)
        if len(self._free) < JOINED_BATCHES:
            self._free.append(owned)


class _Loan:
    """Ends when no array of a batch is in use any more."""


class _Lent:
    """The base of a lent array and of all its views, which lives as long as any of them."""

    def __init__(self, loan: _Loan, owned: np.ndarray):
        self.loan, self.owned = loan, owned

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.owned.__array_interface__


def _empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that begins with a page, so that JAX on the CPU need not copy it."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + mmap.PAGESIZE, np.uint8)
    start = -raw.ctypes.data % mmap.PAGESIZE
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


class Joiner:
    """The batches of an endless source of parts, the next of which is joined ahead."""

    def __init__(self, next_part: Callable[[], dict[str, np.ndarray]], num_parts: int):
        """Begins with the first `take`.

        Args:
            next_part: gives the parts in their order, [rows, ...] each.
            num_parts: of a batch. A batch of one part is that part; it is not taken ahead.
        """
        self._next_part, self._num_parts = next_part, num_parts
        self._memory = BatchMemory()
        self._ahead: _Join | None = None

    def take(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
            Exception: what `next_part` has raised; the parts before it are lost.
        """
        if self._num_parts == 1:
            return self._next_part()
        join = self._ahead or self._begin()
        self._ahead = None
        batch = join.result()
        self._ahead = self._begin()
        return batch

    def close(self) -> None:
        """Ends the thread and drops what it has joined, or ended with; memory is kept."""
        join, self._ahead = self._ahead, None
        if join is not None:
            join.stop()

    def _begin(self) -> _Join:
        return _Join(self._next_part, self._num_parts, self._memory)


class _Join(threading.Thread):
    """A batch that is joined from now on."""

    def __init__(
        self,
        next_part: Callable[[], dict[str, np.ndarray]],
        num_parts: int,
        memory: BatchMemory,
    ):
        super().__init__(name="join_batch", daemon=True)
        self._next_part, self._num_parts, self._memory = next_part, num_parts, memory
        self._wanted, self._stopped = threading.Event(), False
        self._batch: dict[str, np.ndarray] = {}
        self._error: BaseException | None = None
        self.start()

    def result(self) -> dict[str, np.ndarray]:
        """The batch, as soon as it is joined; may be called once."""
        self._wanted.set()
        self.join()
        if self._error is not None:
            raise self._error
        batch, self._batch = self._batch, {}
        return batch

    def stop(self) -> None:
        """Gives the batch up, and waits a while for the end of the thread."""
        self._stopped = True
        self._wanted.set()
        self.join(_END_SECS)

    def run(self) -> None:
        try:
            # Until somebody waits for it, a batch that finds no room is not begun.
            while self._memory.is_short() and not self._wanted.wait(_LOOK_SECS):
                pass
            self._batch = join_parts(self._part, self._num_parts, self._memory)
        except BaseException as error:
            self._error = error

    def _part(self) -> dict[str, np.ndarray]:
        if self._stopped:
            raise InterruptedError("the input is closed")
        return self._next_part()


def join_parts(
    next_part: Callable[[], dict[str, np.ndarray]], num_parts: int, memory: BatchMemory
) -> dict[str, np.ndarray]:
    """Joins the next parts to a batch; each is copied as it comes, while the next one is awaited.

    Args:
        next_part: gives the parts in their order, [rows, ...] each.
        num_parts: of a batch.
        memory: lends the batch.
    """
    part = next_part()
    rows = len(next(iter(part.values())))
    batch = memory.lend(part, num_parts)

    def copy(part: dict[str, np.ndarray], first_row: int) -> None:
        for name, array in part.items():
            batch[name][first_row : first_row + rows] = array

    copies: collections.deque[futures.Future] = collections.deque()
    with futures.ThreadPoolExecutor(COPYING_THREADS, "copy_part") as pool:
        for number in range(num_parts):
            if number:
                part = next_part()
            # A part that waits to be copied takes memory as well.
            if len(copies) == COPYING_THREADS:
                copies.popleft().result()
            copies.append(pool.submit(copy, part, number * rows))
        del part
        for each in copies:
            each.result()
    return batch
