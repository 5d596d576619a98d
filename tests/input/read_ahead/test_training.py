"""Training from an object store gives the batches of local files, whatever the store does."""

import io
import os
import pathlib
import signal
import time
from fractions import Fraction

import numpy as np
import pytest
from absl import logging
from PIL import Image

from benchmarks import slow_store
from diht_jax.input.batch_wait import BatchWait, StoppedWaiting
from diht_jax.input.block_order import BlockOrder
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import Mixture, Source
from diht_jax.input.pipeline import TrainIterator
from diht_jax.input.read_ahead.bound import ReadAheadOptions
from diht_jax.input.shares import Shares
from diht_jax.records.schema import Record, encode_record
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter
from diht_jax.storage.retries import StorageError

RECORDS, BATCH, BLOCK, BAD = 300, 20, 10, 7
EPOCH = RECORDS // BATCH


@pytest.fixture
def store(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder of pictures that all look different; one cannot be decoded. Requests are counted."""
    folder, counts = tmp_path / "records", tmp_path / "counts"
    folder.mkdir()
    counts.mkdir()
    for shard in range(2):
        with TFRecordWriter(folder / f"a-{shard}.tfrecord") as writer:
            for number in range(shard, RECORDS, 2):
                buffer = io.BytesIO()
                Image.new("RGB", (9, 7), (number % 256, number // 256, 0)).save(buffer, "PNG")
                image = b"no picture" if number == BAD else buffer.getvalue()
                writer.write(encode_record(Record(str(number), image, "grey")))
    monkeypatch.setenv(slow_store.COUNTS, str(counts))
    return folder


def train_iterator(folder, cache=None, **options) -> TrainIterator:
    """From the store where there is a folder for the blocks, else from local files."""
    source = TFRecordSource(folder) if cache is None else slow_store.SlowRecords(f"slow://{folder}")
    given = {"num_workers": 0, "prefetch_batches": 1, "on_bad_record": "skip", **options}
    if cache is not None:
        given.setdefault("read_ahead", ReadAheadOptions(cache_dir=str(cache), read_threads=2))
    return TrainIterator(
        source,
        DecodeExample(8, 16, (0.9, 1.0), "{caption}"),
        batch_size=BATCH,
        seed=0,
        order=BlockOrder(source.block_starts(BLOCK), 0, num_streams=4, window_blocks=2),
        **given,
    )


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def check_same(batches, expected, count):
    for _ in range(count):
        ours, theirs = next(batches), next(expected)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def check_requests(read_aheads, before, others, failed=0):
    """Bytes were asked for by the read-aheads, and `others` times beside them.

    Reading goes on for a moment after the last batch, and the store counts it before its reader
    does: so the numbers are compared when they have come to rest.
    """
    folder = pathlib.Path(os.environ[slow_store.COUNTS])
    for _ in range(100):
        numbers = [read_ahead.numbers for read_ahead in read_aheads]
        sent, failures, hedged, blocks = (
            sum(each[name] for each in numbers)
            for name in ("requests", "failed_requests", "hedged_requests", "blocks")
        )
        answered = slow_store.read_counts(folder)["bytes"] - before
        if sent - hedged <= failures + blocks <= sent and sent <= answered <= sent + others:
            break
        time.sleep(0.1)
    assert sent - hedged <= failures + blocks <= sent
    assert sent <= answered <= sent + others
    assert failures >= failed


def test_batches_of_a_store_are_those_of_local_files(store, cache, monkeypatch, hang_guard):
    monkeypatch.setenv(slow_store.FAIL_EVERY, "20")
    batches, local = train_iterator(store, cache), train_iterator(store)
    before = slow_store.read_counts(pathlib.Path(os.environ[slow_store.COUNTS]))["bytes"]
    check_same(batches, local, EPOCH + 2)
    assert batches.skipped_records == local.skipped_records >= 1
    # The bad record is read once more for its message, and perhaps what replaces it.
    check_requests(batches.read_aheads, before, others=3, failed=1)
    # It goes on at another position, on another number of hosts.
    position = batches.get_state()["next_example"] + 5 * BATCH
    for index in range(2):
        host = train_iterator(store, cache, process_index=index, process_count=2)
        expected = train_iterator(store, process_index=index, process_count=2)
        batches.close()
        batches = host
        for iterator in (host, expected):
            iterator.set_state({"next_example": position})
        check_same(host, expected, 2)
        expected.close()
    batches.close()
    local.close()
    assert not list(cache.iterdir())


def mixed_iterator(folder, cache=None, **options) -> TrainIterator:
    """Two thirds in one order of the records, a third in another one: a block is read for both."""
    source = TFRecordSource(folder) if cache is None else slow_store.SlowRecords(f"slow://{folder}")
    decode = DecodeExample(8, 16, (0.9, 1.0), "{caption}")
    starts = source.block_starts(BLOCK)
    sources = [
        Source(str(n), source, BlockOrder(starts, n, num_streams=4, window_blocks=2), decode)
        for n in range(2)
    ]
    shares = Shares([(0, [Fraction(2), Fraction(1)])], num_streams=4, batch_size=BATCH)
    read_ahead = ReadAheadOptions(cache_dir=cache and str(cache), read_threads=4)
    return TrainIterator(
        Mixture(sources, shares),
        batch_size=BATCH,
        seed=0,
        num_workers=0,
        prefetch_batches=1,
        on_bad_record="skip",
        read_ahead=read_ahead,
        **options,
    )


def test_each_source_of_a_mixture_is_read_ahead(store, cache, hang_guard):
    batches, local = mixed_iterator(store, cache), mixed_iterator(store)
    before = slow_store.read_counts(pathlib.Path(os.environ[slow_store.COUNTS]))["bytes"]
    check_same(batches, local, EPOCH + 4)
    many, few = (read_ahead.numbers for read_ahead in batches.read_aheads)
    # All thirty blocks are read for each, and again only where a window comes back later.
    assert 30 <= few["blocks"] <= many["blocks"] <= 60
    # Of each source, the bad record is read once more for its message, and what replaces it.
    check_requests(batches.read_aheads, before, others=2 * 3)
    batches.close()
    local.close()
    assert not list(cache.iterdir())


def test_a_bad_record_whose_replacement_lies_beyond_the_plan(store, cache, hang_guard):
    batches = train_iterator(store, cache)
    # Every record of the next batches is bad; the first good one is far away.
    checked = batches._checked
    for index in range(40 * BATCH):
        checked.exclude(index, "taken for bad")
    good = [n for n in range(RECORDS) if n not in checked._excluded]
    assert not good  # all records: so make those of one late batch good again
    for index in range(30 * BATCH, 31 * BATCH):
        checked._excluded.pop(checked._record_number(index), None)
    expected = train_iterator(store)
    expected._checked._excluded.update(checked._excluded)
    check_same(batches, expected, 1)
    batches.close()
    expected.close()
    assert not list(cache.iterdir())


def test_a_store_that_goes_on_failing_ends_all_workers(store, cache, monkeypatch, hang_guard):
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    options = ReadAheadOptions(cache_dir=str(cache), read_timeout_secs=1.0)
    batches = train_iterator(store, cache, read_ahead=options, num_workers=2)
    monkeypatch.setenv(slow_store.FAIL_EVERY, "1")  # of all requests
    for _ in range(2):
        with pytest.raises(StorageError, match=r"slow:///.*tfrecord.*503 Service") as error:
            next(batches)
        assert "config.data.read_timeout_secs" in str(error.value)
        batches.close()
        monkeypatch.setattr(batches, "_num_workers", 0)  # then in threads
    assert not list(cache.iterdir())
    # The store is there again.
    monkeypatch.delenv(slow_store.FAIL_EVERY)
    check_same(batches, train_iterator(store), 1)
    batches.close()


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="needs Linux")
def test_a_stop_while_a_block_is_awaited(store, cache, monkeypatch, hang_guard):
    # With all blocks fetched before the process is halted, no block would ever be awaited.
    monkeypatch.setenv(slow_store.LATENCY_SECS, "0.2")
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
    batches = train_iterator(store, cache)
    wait = BatchWait(batches, poll_secs=0.01, warn_after_secs=0.02, grace_secs=0.05)
    wait.take(lambda: False)
    os.kill(batches.read_aheads[0].process_id, signal.SIGSTOP)
    taken = 1
    with pytest.raises(StoppedWaiting) as raised:
        while True:  # what had been fetched before
            wait.take(lambda: any("no batch for" in text for text in said))
            taken += 1
    assert raised.value.position.get_state() == {"next_example": BATCH * taken}
    assert any("; read-ahead: process" in text for text in said)
    batches.close()
    assert not list(cache.iterdir())
