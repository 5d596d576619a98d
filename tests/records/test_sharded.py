"""Blocks of consecutive records: their limits."""

import numpy as np

from diht_jax.records.sharded import ShardedRecords


class Counted(ShardedRecords):
    """Shards of some lengths, without contents."""

    def __init__(self, lengths):
        """Of these numbers of records."""
        self._starts = np.cumsum([0, *lengths])

    def __getitem__(self, index):
        raise NotImplementedError


def divide(lengths: list[int], block_records: int) -> list[int]:
    """The limits of the blocks, shard by shard."""
    starts, first = [], 0
    for length in lengths:
        mine = list(range(0, length, block_records))
        if len(mine) > 1 and (length - mine[-1]) * 2 < block_records:
            mine.pop()
        starts += [first + start for start in mine]
        first += length
    return [*starts, first]


def test_blocks_end_with_their_shard_and_a_short_rest_joins_the_one_before():
    assert Counted([10, 0, 3, 9, 1]).block_starts(4).tolist() == [0, 4, 8, 10, 13, 17, 22, 23]
    random = np.random.default_rng(0)
    for _ in range(50):
        lengths, size = random.integers(0, 40, 9).tolist(), int(random.integers(1, 20))
        starts = Counted(lengths).block_starts(size)
        assert starts.dtype == np.int64 and starts.tolist() == divide(lengths, size)
    assert Counted([7, 5]).shard_lengths.tolist() == [7, 5]
