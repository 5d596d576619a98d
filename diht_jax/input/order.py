"""The order of examples: maps a position of the run to a record.

A position counts examples from the start of the run, over all hosts and epochs. Its record is a
function of (seed, position) only. There are two orders: a permutation of all records, and one that
reads whole blocks of consecutive records, so a request to an object store returns hundreds. Both
exclude held-out records.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import NamedTuple

import grain.experimental
import ml_collections
import numpy as np

from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.train_data import NO_RECORDS
from diht_jax.storage.stores import is_remote

# Values of `config.data.order` besides "auto", which chooses one of them.
ORDERS = ("global", "blocks")
# grain permutes 32-bit numbers; with more records some would repeat and others never come.
MAX_GLOBAL_RECORDS = 2**32 - 1
# Cached windows beyond one for each stream, for streams that have just started their next one.
_SPARE_WINDOWS = 256
# Constants of splitmix64: the increment, and the two multipliers of its finaliser.
_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_64_BITS = 2**64 - 1


def resolve_order(order: str, train: str | Sequence[str] | None) -> str:
    """Resolves the order of a config; "auto" is "blocks" if any data are in an object store."""
    if order != "auto":
        return order
    paths = [train] if isinstance(train, str | os.PathLike) else train or ()
    return "blocks" if any(is_remote(os.fspath(path)) for path in paths) else "global"


def make_order(
    records: ShardedRecords,
    order: str,
    data: ml_collections.ConfigDict,
    seed: int,
    process_count: int = 1,
    held_out: np.ndarray = NO_RECORDS,
) -> GlobalOrder | BlockOrder:
    """Creates the order of a source of records on several hosts; `order` may be "auto".

    `data` is the section `config.data`; `held_out` are the numbers of records to exclude.

    Raises:
        ValueError: numbers in `data` are not consistent with each other or the hosts.
    """
    if resolve_order(order, records.paths) == "global":
        return GlobalOrder(len(records), seed, held_out)
    return BlockOrder(
        records.block_starts(data.block_records),
        seed,
        num_streams=count_streams(data, process_count),
        window_blocks=data.window_blocks,
        held_out=held_out,
    )


def count_streams(data: ml_collections.ConfigDict, process_count: int = 1) -> int:
    """Returns the streams of the block order: `data.num_streams`, but at most the batch size.

    Raises:
        ValueError: they do not divide the batch size, or are not divisible by the hosts.
    """
    streams = min(data.num_streams, data.batch_size)
    if data.batch_size % streams:
        fitting = next(n for n in range(streams, 0, -1) if data.batch_size % n == 0)
        raise ValueError(
            f"config.data.num_streams={data.num_streams} does not divide "
            f"config.data.batch_size={data.batch_size}; the next smaller number that does is "
            f"{fitting}"
        )
    if streams % process_count:
        raise ValueError(
            f"config.data.num_streams={data.num_streams} is no multiple of the {process_count} "
            "processes, each of which reads streams of its own; choose a multiple that divides "
            f"config.data.batch_size={data.batch_size}"
        )
    return streams


def derived_seed(seed: int, depth: int) -> int:
    """Returns the seed of the transform `depth` transforms after `.seed(seed)` in a grain graph.

    The order and the crops are still those of an earlier input, which was
    `MapDataset.source(...).seed(seed).shuffle().repeat().random_map(...)`.
    """
    return int(np.random.SeedSequence([seed, depth]).generate_state(1, np.uint32)[0])


class GlobalOrder:
    """An order with a new permutation of all records in every epoch, like grain's `shuffle`."""

    def __init__(self, num_records: int, seed: int, held_out: np.ndarray = NO_RECORDS):
        """Draws nothing yet; `held_out` are the sorted numbers of records to exclude.

        Raises:
            ValueError: there are more records, including held-out ones, than grain can permute.
        """
        if num_records > MAX_GLOBAL_RECORDS:
            raise ValueError(
                f"config.data.order='global' permutes at most {MAX_GLOBAL_RECORDS} records, and "
                f"there are {num_records}: some would come twice an epoch and others never; set "
                "config.data.order='blocks'"
            )
        self.num_records = num_records - len(held_out)
        self._before = held_out - np.arange(len(held_out))  # other records before each of them
        self._seed = derived_seed(seed, depth=1)

    def __getitem__(self, position: int) -> int:
        """Returns the record number, among all records of the source, at a position from 0."""
        epoch, number = divmod(position, self.num_records)
        drawn = grain.experimental.index_shuffle(
            number,
            max_index=self.num_records - 1,
            seed=(self._seed + epoch) % 2**32,
            rounds=4,
        )
        return _skip(self._before, drawn)

    def describe(self) -> str:
        """Describes the order in one sentence, for the log."""
        return f"every epoch is a permutation of all {self.num_records:,} records"


class BlockOrder:
    """An order that shuffles blocks of records in every epoch, mixed over streams and windows.

    In every epoch the blocks are permuted, and the sequence of their records is split into V
    segments of equal length. Row r of the epoch is row r // V of segment r % V. Within a segment,
    the records of windows of W blocks are permuted: a stream draws records from one window until
    it is used up. A batch therefore mixes records of V W blocks, while each block is read within
    one window of one stream (or of two streams, if a segment boundary splits it). A stream's first
    window has 1 to W blocks, so that the streams of a host do not change windows simultaneously.

    All permutations sort by a 64-bit hash (splitmix64), which does not depend on a library's random
    numbers and works for any number of records.
    """

    def __init__(
        self,
        block_starts: np.ndarray,
        seed: int,
        *,
        num_streams: int,
        window_blocks: int,
        held_out: np.ndarray = NO_RECORDS,
    ):
        """Draws nothing yet.

        Args:
            block_starts: int64 [B + 1], the first record of each (non-empty) block; the last entry
                is the number of records, including held-out ones.
            seed: of the permutations.
            num_streams: V. Position p belongs to stream p % V.
            window_blocks: W, the number of blocks that a stream mixes.
            held_out: sorted numbers of records to exclude.
        """
        self.block_starts = np.asarray(block_starts, np.int64)
        # Blocks with at least one included record, and their starts among included records.
        starts = self.block_starts - np.searchsorted(held_out, self.block_starts)
        self._blocks = np.flatnonzero(np.diff(starts))
        self._starts = np.append(starts[self._blocks], starts[-1])
        self._before = held_out - np.arange(len(held_out))  # other records before each of them
        self.num_records = int(starts[-1])
        self.num_streams = num_streams
        self.window_blocks = window_blocks
        self._seed = seed
        self._make_caches()

    def __getitem__(self, position: int) -> int:
        """Returns the record number, among all records of the source, at a position from 0."""
        window, row = self._find(position)
        part, drawn = window.draw(row)
        return _skip(self._before, window.records[part] + drawn)

    def block_at(self, position: int) -> int:
        """Returns the number of the block with the record at a position."""
        window, row = self._find(position)
        return window.blocks[window.draw(row)[0]]

    def block_of(self, record: int) -> int:
        """Returns the number of the block with a record."""
        return _find(self.block_starts, record)

    def blocks_between(self, begins: np.ndarray, ends: np.ndarray) -> set[int]:
        """Returns the blocks of all windows that streams read, each from a position to an end."""
        blocks: set[int] = set()
        for position, end in zip(begins.tolist(), ends.tolist(), strict=True):
            while position < end:
                window, row = self._find(position)
                blocks.update(window.blocks)
                position += (window.first_row + len(window.order) - row) * self.num_streams
        return blocks

    def describe(self) -> str:
        """Describes the order in one sentence, for the log."""
        num_blocks = len(self._blocks)
        mean = self.num_records / num_blocks
        pool = min(self.num_records, round(self.num_streams * self.window_blocks * mean))
        return (
            f"every epoch reads {num_blocks:,} blocks of {mean:,.0f} records in a new order; "
            f"{self.num_streams} streams with windows of {self.window_blocks} blocks mix a pool of "
            f"{pool:,} of {self.num_records:,} records"
        )

    def __getstate__(self) -> dict[str, object]:
        caches = ("_epoch", "_segment", "_window")
        return {name: value for name, value in self.__dict__.items() if name not in caches}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._make_caches()

    def _find(self, position: int) -> tuple[_Window, int]:
        """Returns the window of a position, and the row within the sequence of the epoch."""
        epoch, row = divmod(position, self.num_records)
        row, stream = divmod(row, self.num_streams)
        segment = self._segment(epoch, stream)
        row += segment.first_row
        block = _find(self._epoch(epoch)[1], row)
        number = (block - segment.origin) // self.window_blocks
        return self._window(epoch, stream, number), row

    def _make_caches(self) -> None:
        # Two epochs, for the end of one. The caches lock in C, so threads may share them.
        self._epoch = functools.lru_cache(2)(self._make_epoch)
        self._segment = functools.lru_cache(2 * self.num_streams)(self._make_segment)
        self._window = functools.lru_cache(self.num_streams + _SPARE_WINDOWS)(self._make_window)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the permuted blocks, and the start of each in the sequence of their records."""
        order = _permutation(len(self._blocks), self._seed, epoch)
        return order, np.append(0, np.cumsum(np.diff(self._starts)[order]))

    def _make_segment(self, epoch: int, stream: int) -> _Segment:
        rows, longer = divmod(self.num_records, self.num_streams)
        first = stream * rows + min(stream, longer)
        block = _find(self._epoch(epoch)[1], first)
        # Multiples of the golden ratio are spread evenly, also over the streams of each host.
        first_window_blocks = 1 + ((stream * _INCREMENT & _64_BITS) * self.window_blocks >> 64)
        origin = block + first_window_blocks - self.window_blocks
        return _Segment(first, first + rows + (stream < longer), block, origin)

    def _make_window(self, epoch: int, stream: int, number: int) -> _Window:
        segment, (permuted, starts) = self._segment(epoch, stream), self._epoch(epoch)
        end = segment.origin + (number + 1) * self.window_blocks
        first, end = max(segment.first_block, end - self.window_blocks), min(end, len(permuted))
        rows = np.clip(starts[first : end + 1], segment.first_row, segment.end_row)
        blocks = permuted[first:end]
        # The first record of each part; the segment may start in the middle of a block.
        records = self._starts[blocks] + rows[:-1] - starts[first:end]
        kept = np.diff(rows) > 0
        length = int(rows[-1] - rows[0])
        order = _permutation(length, self._seed, epoch, stream, number)
        offsets = rows[:-1][kept] - rows[0]
        return _Window(
            first_row=int(rows[0]),
            order=order.astype(np.uint16 if length <= 2**16 else np.uint32),
            offsets=offsets.tolist(),
            records=records[kept].tolist(),
            blocks=self._blocks[blocks[kept]].tolist(),
        )


def _skip(before: np.ndarray, number: int) -> int:
    """Converts a number among included records to one among all; for `before` see `_before`."""
    return number + int(np.searchsorted(before, number, side="right")) if len(before) else number


def _find(starts: np.ndarray, number: int) -> int:
    """Returns the index of the block, among those with these starts, with a row or record."""
    return int(starts.searchsorted(number, side="right")) - 1


class _Segment(NamedTuple):
    """A stream's part of an epoch: rows of the sequence, and windows of permuted blocks."""

    first_row: int
    end_row: int
    first_block: int
    origin: int  # the block where the first window would start if it were complete


@dataclasses.dataclass(frozen=True)
class _Window:
    """The permuted rows of one window; the lists have an entry for each block."""

    first_row: int  # in the sequence of the epoch
    order: np.ndarray  # the permutation
    offsets: list[int]  # start of each block before the permutation
    records: list[int]  # first record of each block that belongs to the window
    blocks: list[int]  # numbers of the blocks

    def draw(self, row: int) -> tuple[int, int]:
        """Returns the block's entry for a row of the epoch, and the record's number within it."""
        drawn = int(self.order[row - self.first_row])
        part = bisect.bisect_right(self.offsets, drawn) - 1
        return part, drawn - self.offsets[part]


def _permutation(length: int, *key: int) -> np.ndarray:
    """Returns a permutation, int64 [length], that depends only on the key."""
    state = 0
    for part in key:
        mixed = _mix(np.array([(state + part + 1) * _INCREMENT & _64_BITS], np.uint64))
        state = int(mixed[0])
    # Different inputs have different hashes, so all sorting algorithms give the same result.
    inputs = np.arange(1, length + 1, dtype=np.uint64) * np.uint64(_INCREMENT) + np.uint64(state)
    return np.argsort(_mix(inputs))


def _mix(values: np.ndarray) -> np.ndarray:
    """Applies the finaliser of splitmix64, which is bijective (Steele et al., OOPSLA 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FIRST)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_SECOND)
    return values ^ (values >> np.uint64(31))
