"""Batches joined from sub-batches, one batch ahead and in memory that is used again.

A host's batch may have ten gigabytes. The kernel clears every page of new memory at its first use,
which takes longer than the copy; so the memory of a batch is used again once nothing refers to it
any more: neither a caller, nor a view, nor a transfer to a device, nor an array of JAX on the CPU,
which may be a view of what it was made of. All of these hold references, which are counted.

While the devices take a batch, a thread joins the next one.
"""

from __future__ import annotations

import collections
import math
import mmap
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent import futures

import numpy as np

# Threads that copy sub-batches into their batch. One thread would copy about as fast as eight GPUs
# train. A copy does not hold the interpreter's lock.
COPYING_THREADS = 4
# Batches of this process in addition to the workers': one is joined, one goes to the devices.
JOINED_BATCHES = 2
# How often a thread that joins ahead looks for memory that is free again.
_LOOK_SECS = 0.005
# How long the end of such a thread is awaited: it waits for a sub-batch that is being decoded.
_END_SECS = 5.0


class BatchMemory:
    """Memory of joined batches."""

    def __init__(self):
        # For each batch its bytes by name. All arrays that are lent are views of them.
        self._batches: list[dict[str, np.ndarray]] = []

    def is_short(self) -> bool:
        """Returns whether as many batches are in use as there should be at a time."""
        return sum(_references(batch) > _UNUSED for batch in self._batches) >= JOINED_BATCHES

    def lend(self, part: dict[str, np.ndarray], num_parts: int) -> dict[str, np.ndarray]:
        """Uninitialised arrays for `num_parts` parts like `part`, [num_parts * rows, ...] each."""
        wanted = {name: num_parts * array.nbytes + mmap.PAGESIZE for name, array in part.items()}
        unused = [batch for batch in self._batches if _references(batch) <= _UNUSED]
        fitting = (b for b in unused if {name: raw.nbytes for name, raw in b.items()} == wanted)
        batch = next(fitting, None)
        # What does not fit, or is more than is needed at a time, is given back to the system.
        gone = [b for b in unused if b is not batch][JOINED_BATCHES - 1 :]
        self._batches = [b for b in self._batches if not any(b is other for other in gone)]
        if batch is None:
            batch = {name: np.empty(num_bytes, np.uint8) for name, num_bytes in wanted.items()}
            self._batches.append(batch)
        lent = {}
        for name, array in part.items():
            shape = (num_parts * len(array), *array.shape[1:])
            start = -batch[name].ctypes.data % mmap.PAGESIZE  # so that JAX on the CPU need not copy
            end = start + math.prod(shape) * array.itemsize
            lent[name] = batch[name][start:end].view(array.dtype).reshape(shape)
        return lent


def _references(batch: Mapping[str, np.ndarray]) -> int:
    """References to the most used array of a batch, those of its views included."""
    return max((sys.getrefcount(array) for array in batch.values()), default=0)


_UNUSED = _references({"": np.empty(1)})


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
