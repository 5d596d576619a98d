"""Example orders: whole epochs, the same order on any number of hosts, and mixing quality."""

import pickle

import numpy as np
import pytest

from diht_jax.config import default_config
from diht_jax.input.order import BlockOrder, GlobalOrder, count_streams

# Records, block, streams, window: odd numbers, streams without a record, one block, one stream.
SHAPES = [
    (1000, 16, 8, 4),
    (997, 13, 7, 3),
    (101, 7, 64, 2),
    (5, 8, 16, 2),
    (64, 64, 4, 16),
    (250, 1, 1, 5),
    (1, 1, 1, 1),
]


def block_order(records, block, streams, window, seed=0, **held_out):
    # A remainder below half a block joins the block before it, as in `ShardedRecords`.
    starts = [*range(0, max(1, records - (block - 1) // 2), block), records]
    return BlockOrder(np.array(starts), seed, num_streams=streams, window_blocks=window, **held_out)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_epoch_holds_each_record_once(shape):
    order, n = block_order(*shape), shape[0]
    epochs = [[order[epoch * n + row] for row in range(n)] for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert n < 64 or len(set(map(tuple, epochs))) == 3


@pytest.mark.parametrize(
    "held_out", [[], [0], [99], [3, 4, 50], range(24, 40), range(1, 100)], ids=str
)
def test_every_epoch_holds_each_record_once_that_is_not_held_out(held_out):
    kept = sorted(set(range(100)) - set(held_out))
    held_out = np.array(held_out, np.int64)
    for order in (
        GlobalOrder(100, seed=3, held_out=held_out),
        block_order(100, 8, 4, 2, held_out=held_out),
    ):
        for epoch in range(2):
            found = [order[epoch * len(kept) + row] for row in range(len(kept))]
            assert sorted(found) == kept, (order, epoch)


def test_blocks_without_a_record_to_train_on_are_never_waited_for():
    # Blocks of 8 records, the second of which is held out.
    order = block_order(64, 8, 4, 2, held_out=np.arange(8, 16))
    assert order.blocks_between(np.arange(4), np.full(4, 56)) == {0, *range(2, 8)}
    assert {order.block_at(position) for position in range(56)} == {0, *range(2, 8)}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_blocks_of_some_positions_are_those_of_their_windows(shape):
    order, n, streams = block_order(*shape), shape[0], shape[2]
    for first, end in ((n // 2, n), (n - 1, n + 3), (n // 3, 3 * n)):
        found = order.blocks_between(first + np.arange(streams), np.full(streams, end))
        drawn = {order.block_of(order[position]) for position in range(first, end)}
        assert {order.block_at(position) for position in range(first, end)} == drawn <= found


def test_the_order_is_a_function_of_seed_and_position():
    shape = SHAPES[1]
    order, other = block_order(*shape), block_order(*shape, seed=1)
    expected = [order[position] for position in range(3000)]
    again = pickle.loads(pickle.dumps(order))
    assert [again[position] for position in reversed(range(3000))] == expected[::-1]
    assert [other[position] for position in range(3000)] != expected
    # If this changes, runs in this order can no longer be resumed.
    order = block_order(40, 4, 4, 2, seed=7)
    assert [order[p] for p in range(12)] == [33, 36, 31, 16, 32, 37, 28, 19, 34, 2, 30, 17]


def test_a_stream_reads_one_window_of_blocks_after_the_other():
    n, block, streams, window = 4096, 16, 4, 8
    order = block_order(n, block, streams, window, seed=3)
    for stream in range(streams):
        blocks = [order[position] // block for position in range(stream, n, streams)]
        assert len(blocks) == 1024
        spans = [np.flatnonzero(np.equal(blocks, number)) for number in set(blocks)]
        assert [span for span in spans if len(span) != block] == []
        assert max(span[-1] - span[0] for span in spans) < window * block
        assert np.mean([span[-1] - span[0] for span in spans]) > window * block / 2
    # Each epoch combines different blocks in a window.
    first = [{order[e * n + 4 * row] // block for row in range(16)} for e in range(2)]
    assert first[0] != first[1]


def test_a_host_needs_the_blocks_of_its_own_streams_only():
    order, process_count = block_order(64 * 256, 16, 64, 4), 16
    needed = [
        {order.block_of(order[p]) for p in range(process, 64 * 256, process_count)}
        for process in range(process_count)
    ]
    assert sum(map(len, needed)) == len(set.union(*needed)) == 1024


def test_more_than_four_billion_records():
    n, block, streams = 2**32 + 77, 2**14, 16
    order = block_order(n, block, streams, 1)
    assert order[0] != order[2**32] and 0 <= order[2**32] < n
    # A window inside a stream has each record of a block once, also beyond 2^32.
    for stream in (0, streams - 1):
        rows = range(stream, n, streams)[-3 * block :]
        number = order[rows[len(rows) // 2]] // block
        drawn = [order[p] for p in rows if order[p] // block == number]
        assert sorted(drawn) == list(range(number * block, (number + 1) * block))
    last = {order[position] for position in range(n - 5000, n)}
    assert len(last) == 5000 and max(last) < n
    with pytest.raises(ValueError, match="config.data.order='blocks'"):
        GlobalOrder(n, seed=0)
    with pytest.raises(ValueError, match="at most 4294967295 records, and there are 4294967296"):
        GlobalOrder(2**32, seed=0)
    GlobalOrder(2**32 - 1, seed=0)


def section(**values):
    config = default_config().data
    config.update(values)
    return config


def test_streams_divide_the_batch_and_hosts_divide_the_streams():
    assert count_streams(section()) == 1024
    assert count_streams(section(batch_size=48), process_count=3) == 48
    with pytest.raises(ValueError, match=r"num_streams=1000 does not divide .*=65536; .* is 512$"):
        count_streams(section(num_streams=1000))
    with pytest.raises(ValueError, match="num_streams=1024 is no multiple of the 3 processes"):
        count_streams(section(batch_size=3072), process_count=3)
