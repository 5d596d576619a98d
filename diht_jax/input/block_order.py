"""The order of examples that reads whole blocks of consecutive records, and mixes many of them.

A position counts examples from the start of the run, over all hosts and epochs. The record there is
a function of (seed, position) alone.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterable, Iterator

import numpy as np

# Windows beyond one for each stream that are kept: of streams that have just gone on to their next.
_SPARE_WINDOWS = 256
# Of splitmix64: the increment, and the two multipliers of its finaliser.
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_64_BITS = 2**64 - 1


class BlockOrder:
    """Every epoch reads the blocks of records in a new order, mixed over streams and windows.

    The blocks of an epoch are permuted, and their records, one block after the other, are cut into
    V segments of equal length. Row r of the epoch is row r // V of segment r % V. Within a segment,
    windows of W blocks are permuted: a stream draws its records from one window until that is used
    up. So a batch mixes records of V W blocks, while every block is read within one window of one
    stream (of two streams where a cut runs through it). A stream's first window has 1 to W blocks,
    so that the streams, on each host, do not all change windows at the same time.

    All permutations sort by a 64-bit hash (splitmix64), which is no library's random stream and is
    right for any number of records.
    """

    def __init__(
        self, block_starts: np.ndarray, seed: int, *, num_streams: int, window_blocks: int
    ):
        """Draws nothing yet.

        Args:
            block_starts: int64 [B + 1], the first record of each block; the last entry is n.
            seed: of the permutations.
            num_streams: V. Position p belongs to stream p % V.
            window_blocks: W, that a stream mixes.

        Raises:
            ValueError: no record, an empty block, or numbers below 1.
        """
        self.block_starts = np.asarray(block_starts, np.int64)
        if (
            len(self.block_starts) < 2
            or self.block_starts[0]
            or np.diff(self.block_starts).min() < 1
        ):
            raise ValueError("block_starts: expected at least one block, from record 0, none empty")
        if num_streams < 1 or window_blocks < 1:
            raise ValueError(
                f"num_streams={num_streams}, window_blocks={window_blocks}: expected at least 1"
            )
        self.num_records = int(self.block_starts[-1])
        self.num_streams = num_streams
        self.window_blocks = window_blocks
        self._seed = seed
        self._make_caches()

    def __getitem__(self, position: int) -> int:
        """The number of the record, in [0, n), at a position from 0."""
        epoch, row = divmod(position, self.num_records)
        row, stream = divmod(row, self.num_streams)
        segment = self._segment(epoch, stream)
        row += segment.first_row
        number = segment.window_of(self._epoch(epoch).find(row))
        return self._window(epoch, stream, number).record(row)

    def upcoming_blocks(
        self, first_position: int, num_positions: int, process_index: int, process_count: int
    ) -> list[tuple[int, int, int]]:
        """The blocks that a process needs for a range of positions, by the time of their first use.

        Args:
            first_position, num_positions: the range, over all processes.
            process_index, process_count: the process reads the positions p with
                p % process_count == process_index; the count must divide the number of streams.

        Returns:
            For each block its number, and the first and the last position that needs it. Every
            window that the range touches is listed with all its blocks, also where the last
            position, or even the first one, lies behind the range; never before it. A block stands
            here twice where it is needed in two windows that do not overlap in time.
        """
        return merge_needs(self.needs(first_position, num_positions, process_index, process_count))

    def needs(
        self, first_position: int, num_positions: int, process_index: int, process_count: int
    ) -> Iterator[tuple[int, int, int]]:
        """As `upcoming_blocks`, in no order, and once for each stream and window that needs it."""
        end = first_position + num_positions
        last_epoch = (end - 1) // self.num_records
        for epoch in range(first_position // self.num_records, last_epoch + 1):
            base = epoch * self.num_records
            rows = range(max(0, first_position - base), min(self.num_records, end - base))
            for stream in range(min(self.num_streams, self.num_records)):
                if (base + stream) % process_count == process_index:
                    for block, first, last in self._needs(epoch, stream, rows):
                        yield block, base + first, base + last

    def describe(self, batch_size: int) -> str:
        """What is mixed, for the log."""
        num_blocks = len(self.block_starts) - 1
        mean = self.num_records / num_blocks
        pool = min(self.num_records, round(self.num_streams * self.window_blocks * mean))
        return (
            f"every epoch reads {num_blocks:,} blocks of {mean:,.0f} records in a new order; "
            f"{self.num_streams} streams with windows of {self.window_blocks} blocks mix a pool of "
            f"{pool:,} of {self.num_records:,} records (a row's block has "
            f"{self.same_block_rows(batch_size):.1f} other rows of its batch, on average)"
        )

    def same_block_rows(self, batch_size: int) -> float:
        """How many other rows of a batch come from the block of a row, on average.

        Two rows of one stream that are d rows apart lie in one window of L rows with probability
        (L - d) / L, and are then of one block with probability (K - 1) / (L - 1), with K = n / B
        and L = W K. Counted for the blocks' mean length; the start of an epoch and blocks that two
        streams share are left out.

        Args:
            batch_size: N, a multiple of V.
        """
        block_rows = self.num_records / (len(self.block_starts) - 1)
        window_rows = min(self.window_blocks * block_rows, self.num_records / self.num_streams)
        distances = np.arange(1, batch_size // self.num_streams)
        pairs = (len(distances) + 1 - distances) * np.maximum(0, 1 - distances / window_rows)
        same_block = max(0.0, (block_rows - 1) / max(1.0, window_rows - 1))
        return float(2 * self.num_streams * pairs.sum() * min(1.0, same_block) / batch_size)

    def __getstate__(self) -> dict[str, object]:
        caches = ("_epoch", "_segment", "_window")
        return {name: value for name, value in self.__dict__.items() if name not in caches}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def _make_caches(self) -> None:
        # Two epochs meet where one ends. The caches lock in C: threads may share them.
        self._epoch = functools.lru_cache(2)(self._make_epoch)
        self._segment = functools.lru_cache(2 * self.num_streams)(self._make_segment)
        self._window = functools.lru_cache(self.num_streams + _SPARE_WINDOWS)(self._make_window)

    def _make_epoch(self, epoch: int) -> _Epoch:
        order = _permutation(len(self.block_starts) - 1, self._seed, epoch)
        starts = np.zeros(len(order) + 1, np.int64)
        np.cumsum(np.diff(self.block_starts)[order], out=starts[1:])
        return _Epoch(order, starts)

    def _make_segment(self, epoch: int, stream: int) -> _Segment:
        rows, longer = divmod(self.num_records, self.num_streams)
        first = stream * rows + min(stream, longer)
        return _Segment(
            first_row=first,
            end_row=first + rows + (stream < longer),
            first_block=self._epoch(epoch).find(first),
            # Multiples of the golden ratio are spread evenly, also over every H-th stream.
            first_window_blocks=1 + ((stream * _INCREMENT & _64_BITS) * self.window_blocks >> 64),
            window_blocks=self.window_blocks,
        )

    def _make_window(self, epoch: int, stream: int, number: int) -> _Window:
        segment, permuted = self._segment(epoch, stream), self._epoch(epoch)
        first = segment.first_block_of(number)
        end = min(segment.first_block_of(number + 1), len(permuted.order))
        rows = np.clip(permuted.starts[first : end + 1], segment.first_row, segment.end_row)
        blocks = permuted.order[first:end]
        # The first record of a part, where the segment begins within its block.
        records = self.block_starts[blocks] + rows[:-1] - permuted.starts[first:end]
        kept = np.diff(rows) > 0
        length = int(rows[-1] - rows[0])
        order = _permutation(length, self._seed, epoch, stream, number)
        return _Window(
            first_row=int(rows[0]),
            order=order.astype(np.uint16 if length <= 2**16 else np.uint32),
            offsets=(rows[:-1][kept] - rows[0]).tolist(),
            records=records[kept].tolist(),
            blocks=blocks[kept].tolist(),
        )

    def _needs(self, epoch: int, stream: int, rows: range) -> Iterator[tuple[int, int, int]]:
        """Block, first and last row of the epoch that needs it, for the rows of one stream."""
        segment = self._segment(epoch, stream)
        # The part of this stream: from the first of its rows in the range to behind the last one.
        first = segment.first_row + max(0, -(-(rows.start - stream) // self.num_streams))
        end = segment.first_row + -(-(rows.stop - stream) // self.num_streams)
        end = min(end, segment.end_row)
        row = first
        while row < end:
            number = segment.window_of(self._epoch(epoch).find(row))
            window = self._window(epoch, stream, number)
            # As (row of the epoch) = stream + V * (row of the segment).
            base = stream + (window.first_row - segment.first_row) * self.num_streams
            for block, used_first, used_last in window.needs(row - window.first_row):
                yield (
                    block,
                    base + used_first * self.num_streams,
                    base + used_last * self.num_streams,
                )
            row = window.first_row + len(window.order)


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """The permuted blocks of an epoch, and the row at which each of them begins."""

    order: np.ndarray
    starts: np.ndarray

    def find(self, row: int) -> int:
        """Which of the permuted blocks holds a row of the sequence of all their records."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A stream's part of an epoch: rows of the sequence, and windows of permuted blocks."""

    first_row: int
    end_row: int
    first_block: int
    first_window_blocks: int
    window_blocks: int

    def window_of(self, block: int) -> int:
        """The number of the window that a permuted block belongs to."""
        return 1 + (block - self.first_block - self.first_window_blocks) // self.window_blocks

    def first_block_of(self, window: int) -> int:
        """Where a window begins."""
        if not window:
            return self.first_block
        return self.first_block + self.first_window_blocks + (window - 1) * self.window_blocks


@dataclasses.dataclass(frozen=True)
class _Window:
    """The rows of one window: `order` permutes them, `offsets` are where its blocks begin."""

    first_row: int
    order: np.ndarray
    offsets: list[int]
    records: list[int]
    blocks: list[int]

    def record(self, row: int) -> int:
        """The record at a row of the sequence."""
        drawn = int(self.order[row - self.first_row])
        part = bisect.bisect_right(self.offsets, drawn) - 1
        return self.records[part] + drawn - self.offsets[part]

    def needs(self, first: int) -> Iterator[tuple[int, int, int]]:
        """Block, first and last row of the window that needs it, from the row `first` on."""
        parts = np.searchsorted(self.offsets, self.order[first:], side="right") - 1
        drawn, first_used = np.unique(parts, return_index=True)
        last_used = len(parts) - 1 - np.unique(parts[::-1], return_index=True)[1]
        for part, used_first, used_last in zip(drawn, first_used, last_used, strict=True):
            yield self.blocks[part], first + int(used_first), first + int(used_last)


def merge_needs(needs: Iterable[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Needs of blocks by their first position; those of one block are one where they overlap."""
    found: dict[int, list[tuple[int, int]]] = {}
    for block, first, last in needs:
        found.setdefault(block, []).append((first, last))
    merged = [(block, *need) for block in found for need in _merge_overlapping(found[block])]
    return sorted(merged, key=lambda need: (need[1], need[0]))


def _merge_overlapping(needs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(needs):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _permutation(length: int, *key: int) -> np.ndarray:
    """int64 [length]: a permutation that is a function of the key alone."""
    state = 0
    for part in key:
        state = _mix(np.array([(state + part + 1) * _INCREMENT & _64_BITS], np.uint64))[0]
        state = int(state)
    # Different inputs have different hashes, so that any way of sorting gives the same result.
    inputs = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_INCREMENT) + np.uint64(state)
    return np.argsort(_mix(inputs))


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of 64-bit numbers (Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))
