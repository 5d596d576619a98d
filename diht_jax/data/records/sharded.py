"""Records that are numbered through many shards: the part that all formats of shards share.

A block is a run of consecutive records of one shard, which one ranged request brings.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np


class ShardedRecords(Sequence[bytes]):
    """A sequence over the records of several shards, in the order of the shards.

    Attributes:
        paths: of the shards.
    """

    paths: list[str]
    _starts: np.ndarray  # int64 [shards + 1], the first record of each shard

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shard_lengths(self) -> np.ndarray:
        """int64 [shards], the records of each shard."""
        return np.diff(self._starts)

    def block_starts(self, block_records: int) -> np.ndarray:
        """Divides the records into blocks that never cross the end of a shard.

        Blocks begin at multiples of `block_records` within their shard. A rest of less than half
        a block joins the block before it.

        Args:
            block_records: records of a block.

        Returns:
            int64 [blocks + 1], the first record of each block; the last entry is the number of
            records.
        """
        lengths = self.shard_lengths
        whole, rest = np.divmod(lengths, block_records)
        counts = whole + ((2 * rest >= block_records) | ((whole == 0) & (rest > 0)))
        firsts = np.cumsum(counts) - counts  # the first block of each shard
        within = np.arange(counts.sum()) - np.repeat(firsts, counts)
        starts = np.repeat(self._starts[:-1], counts) + within * block_records
        return np.append(starts, len(self)).astype(np.int64)

    def locate(self, index: int) -> tuple[str, int]:
        """Shard path and number within the shard of a record, for messages.

        Args:
            index: in [0, len).
        """
        number, record = self._find(index)
        return self.paths[number], record

    def _find(self, index: int) -> tuple[int, int]:
        """The number of a record's shard, and of the record within it."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self!r}")
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _find_range(self, first: int, last: int) -> tuple[int, int, int]:
        """The shard of the records [first, last), and the first and the end within it.

        Raises:
            IndexError: there is no such record, or they do not lie in one shard.
        """
        number, begin = self._find(first)
        end = begin + last - first
        if not begin < end <= self.shard_lengths[number]:
            raise IndexError(f"records {first} to {last - 1} of {self!r} are not in one shard")
        return number, begin, end
