"""Sub-batches: the parts of a host's batch that workers decode, and how they are joined.

A host's batch may have ten gigabytes. One worker would need a minute for it, and several of them in
each worker's queue would fill the machine. A part of 256 rows is some forty megabytes.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures

import numpy as np

# A part has at most so many rows.
MAX_ROWS = 256
# One thread would copy about as fast as eight GPUs train. A copy does not hold the interpreter's
# lock.
COPYING_THREADS = 4


def rows_of_part(local_batch_size: int) -> int:
    """The largest divisor of a host's batch that is at most `MAX_ROWS`."""
    return next(
        rows
        for rows in range(min(MAX_ROWS, local_batch_size), 0, -1)
        if local_batch_size % rows == 0
    )


class SubBatches(Sequence[dict[str, np.ndarray]]):
    """The parts of one host's batches, one batch after the other, as a grain data source.

    Part i of the run has the host's rows [i * rows, (i + 1) * rows).
    """

    def __init__(
        self,
        decode_rows: Callable[[range], Iterable[dict[str, np.ndarray]]],
        *,
        batch_size: int,
        first_example: int = 0,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Decodes nothing yet.

        Args:
            decode_rows: gives the decoded examples at indices of the run's order.
            batch_size: global, a multiple of `process_count`.
            first_example: of the batch that part 0 begins.
            process_index, process_count: this host's number, and how many there are.
        """
        self._decode_rows = decode_rows
        self._batch_size = batch_size
        self._first_example = first_example
        self._process_index = process_index
        self._process_count = process_count
        self.rows = rows_of_part(batch_size // process_count)
        self.parts_per_batch = batch_size // process_count // self.rows

    def __len__(self) -> int:
        """Endless, as far as grain can count."""
        return sys.maxsize // (self.rows * self._process_count) // 2

    def __repr__(self) -> str:
        return f"SubBatches(rows={self.rows}, batch_size={self._batch_size})"

    def indices(self, part: int) -> range:
        """The indices in the run's order of the examples of a part."""
        stride = self._process_count
        first = self._first_example + self._process_index + part * self.rows * stride
        return range(first, first + self.rows * stride, stride)

    def __getitem__(self, part: int) -> dict[str, np.ndarray]:
        """The arrays of a part, [rows, ...] each."""
        arrays: dict[str, np.ndarray] = {}
        for row, example in enumerate(self._decode_rows(self.indices(part))):
            if not arrays:
                arrays = {name: _empty_rows(self.rows, value) for name, value in example.items()}
            for name, array in arrays.items():
                array[row] = example[name]
        return arrays


def join_parts(
    next_part: Callable[[], dict[str, np.ndarray]], num_parts: int
) -> dict[str, np.ndarray]:
    """One batch of the next parts; each is copied as it comes, while the next one is awaited.

    Args:
        next_part: gives the parts in their order, [rows, ...] each.
        num_parts: of a batch. A batch of one part is that part.
    """
    part = next_part()
    if num_parts == 1:
        return part
    rows = len(next(iter(part.values())))
    batch = {name: _empty_rows(num_parts * rows, array[0]) for name, array in part.items()}
    copies: collections.deque[futures.Future] = collections.deque()
    with futures.ThreadPoolExecutor(COPYING_THREADS, "join_batch") as pool:
        for number in range(num_parts):
            if number:
                part = next_part()
            # A part that waits to be copied takes memory as well.
            if len(copies) == COPYING_THREADS:
                copies.popleft().result()
            copies.append(pool.submit(_copy_part, batch, part, number * rows))
        del part
        for copy in copies:
            copy.result()
    return batch


def _copy_part(batch: dict[str, np.ndarray], part: dict[str, np.ndarray], first_row: int) -> None:
    for name, array in part.items():
        batch[name][first_row : first_row + len(array)] = array


def _empty_rows(rows: int, value: np.ndarray) -> np.ndarray:
    value = np.asarray(value)
    return np.empty((rows, *value.shape), value.dtype)
