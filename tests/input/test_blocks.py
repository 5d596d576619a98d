"""Training from an object store gives the batches of local files and requests each block once."""

import itertools
import pathlib
import threading
from fractions import Fraction

import numpy as np
import pytest

from benchmarks import slow_store
from diht_jax.input import blocks
from diht_jax.input.blocks import BlockStore
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import Mixture, MixtureWeights, Source
from diht_jax.input.order import BlockOrder
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.schema import Record
from diht_jax.records.shard_files import DamagedRecordError
from diht_jax.storage import stores
from diht_jax.storage.stores import StorageError
from diht_jax.training.recipe import default_config
from tests import make
from tests.make import encoded, plain, write_records
from tests.waiting import wait_until

RECORDS, BATCH, BLOCK, BAD = 300, 20, 10, 7
EPOCH, BLOCKS = RECORDS // BATCH, RECORDS // BLOCK
DECODE = DecodeExample(8, 16, (0.9, 1.0), "{caption}")


def write_store(tmp_path, num_records=RECORDS) -> pathlib.Path:
    """Writes a folder of distinct images, one of which cannot be decoded."""
    images = [encoded(plain((n % 256, n // 256, 0), (9, 7))) for n in range(num_records)]
    images[BAD] = b"no picture"
    records = [Record(str(number), image, "grey") for number, image in enumerate(images)]
    return write_records(tmp_path / "records", records, lengths=[num_records // 2] * 2)


@pytest.fixture
def store(tmp_path, count_requests) -> pathlib.Path:
    return write_store(tmp_path)


@pytest.fixture
def count_requests(tmp_path, monkeypatch):
    counts = tmp_path / "counts"
    counts.mkdir()
    monkeypatch.setenv(slow_store.COUNTS, str(counts))


@pytest.fixture
def cache(tmp_path) -> pathlib.Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def open_source(folder, cache) -> TFRecordSource:
    """Opens the store if there is a cache folder for its blocks, else the local files."""
    return TFRecordSource(folder) if cache is None else slow_store.SlowRecords(f"slow://{folder}")


def block_order(source, seed=0) -> BlockOrder:
    return BlockOrder(source.block_starts(BLOCK), seed, num_streams=4, window_blocks=2)


def section(cache):
    data = default_config().data
    data.cache_dir = str(cache)
    return data


def train_iterator(folder, cache=None, **options):
    source = open_source(folder, cache)
    given = {"num_workers": 0, "prefetch_batches": 1, "on_bad_record": "skip", **options}
    return make.train_iterator(
        make.one_source(source, DECODE, order=block_order(source)),
        batch_size=BATCH,
        seed=0,
        cache_dir=cache and str(cache),
        read_threads=2,
        **given,
    )


def check_same(batches, expected, count):
    for _ in range(count):
        ours, theirs = next(batches), next(expected)
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])


def requests_for_bytes(store) -> int:
    return slow_store.read_counts(store.parent / "counts").get("bytes", 0)


def folders_in(cache) -> list[pathlib.Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    "num_blocks, room, num_workers",
    [(6, 99, 2), (20, 99, 0), (72, 99, 0), (72, 50, 0), (72, 50, 2)],
)
def test_batches_of_a_store_are_those_of_local_files_and_no_block_in_use_is_deleted(
    tmp_path, cache, count_requests, num_blocks, room, num_workers
):
    """At the end of an epoch, records of the next epoch are prefetched."""
    store = write_store(tmp_path, num_blocks * BLOCK)
    block_bytes = sum(path.stat().st_size for path in store.glob("*.tfrecord")) / num_blocks
    options = {"num_workers": num_workers, "read_ahead_gib": room * block_bytes / 2**30}
    batches, local = train_iterator(store, cache, **options), train_iterator(store)
    before = requests_for_bytes(store)
    check_same(batches, local, 3 * num_blocks * BLOCK // BATCH)
    assert batches.skipped_records == local.skipped_records >= 2
    kept = len(list(folders_in(cache)[0].glob("*.block")))
    batches.close()
    local.close()
    assert not folders_in(cache)
    # Two threads of each worker may both read the index of each of two shards, and the replacement
    # of the bad record may be read alone in each epoch, with its index.
    asked = requests_for_bytes(store) - before
    most = num_blocks if room > num_blocks else 3 * num_blocks + room
    assert min(num_blocks, 3 * room) <= asked <= most + 4 * num_workers + 4 * 2
    assert kept == num_blocks or kept <= room < num_blocks


def test_it_goes_on_at_another_position_on_other_hosts(store, cache):
    first = train_iterator(store, cache)
    next(first)
    position = {"next_example": first.get_state()["next_example"] + 5 * BATCH}
    first.close()
    for index in range(2):
        host = train_iterator(store, cache, process_index=index, process_count=2)
        expected = train_iterator(store, process_index=index, process_count=2)
        for iterator in (host, expected):
            next(iterator)
            iterator.set_state(position)
        check_same(host, expected, 2)
        host.close()
        expected.close()
    assert not folders_in(cache)


def test_each_source_of_a_mixture_has_blocks_of_its_own(store, cache):
    def mixed(cache=None):
        """Two thirds in one order of the records, one third in another."""
        source = open_source(store, cache)
        sources = [Source(str(n), source, block_order(source, seed=n), DECODE) for n in range(2)]
        weights = MixtureWeights([(0, [Fraction(2), Fraction(1)])], num_streams=4, batch_size=BATCH)
        return make.train_iterator(
            Mixture(sources, weights),
            batch_size=BATCH,
            seed=0,
            num_workers=0,
            prefetch_batches=1,
            on_bad_record="skip",
            cache_dir=cache and str(cache),
            read_threads=4,
        )

    batches, local = mixed(cache), mixed()
    check_same(batches, local, EPOCH + 4)
    assert len(batches.block_stores) == len(folders_in(cache)) == 2
    batches.close()
    local.close()
    assert not folders_in(cache)


@pytest.fixture
def no_waiting(monkeypatch):
    """Makes pauses take no real time, but advance the clock."""
    now = [0.0]

    def sleep(secs):
        now[0] += secs

    monkeypatch.setattr(stores, "sleep", sleep)
    monkeypatch.setattr(blocks, "sleep", sleep)
    return now


def test_failing_requests_are_sent_again(store, cache, monkeypatch, no_waiting):
    batches, local = train_iterator(store, cache), train_iterator(store)
    monkeypatch.setenv(slow_store.FAIL_EVERY, "5")
    check_same(batches, local, EPOCH)
    assert requests_for_bytes(store) > 1.2 * BLOCKS
    batches.close()


@pytest.mark.parametrize("late", ["an error", "an answer"])
def test_of_a_request_that_was_overtaken_an_error_changes_nothing(store, cache, monkeypatch, late):
    """The first request answers while the second waits; its error must cause no third request."""
    source, requests, read = open_source(store, cache), [], blocks.read_extent

    def read_extent(*extent):
        requests.append(threading.current_thread())
        if len(requests) == 1:
            wait_until(lambda: len(requests) >= 2)
            if late == "an error":
                raise ConnectionResetError("too late")
            return read(*extent)
        if late == "an error":
            requests[0].join()
            return read(*extent)
        closed.wait()  # forever
        return b""

    closed = threading.Event()
    calls = itertools.count()

    def clock():
        """The second call's patience with the first request ends once that has begun."""
        return blocks._PATIENCE_SECS if next(calls) > 1 and requests else 0.0

    monkeypatch.setattr(blocks, "clock", clock)
    monkeypatch.setattr(blocks, "read_extent", read_extent)
    blocks_of = BlockStore(source, block_order(source), section(cache))
    blocks_of.start()
    blocks_of.read(0, fetch=True)
    assert len(requests) == 2
    assert blocks_of.read(0) == TFRecordSource(store)[0]
    closed.set()
    blocks_of.stop()


def test_a_closed_input_no_longer_asks_a_store_that_fails(store, cache, monkeypatch):
    before, asked = set(threading.enumerate()), threading.Event()

    def fail(*_):
        asked.set()
        raise ConnectionResetError("no answer")

    monkeypatch.setattr(blocks, "read_extent", fail)
    source = open_source(store, cache)
    blocks_of = BlockStore(source, block_order(source), section(cache))
    blocks_of.start()
    blocks_of.request(0)
    assert asked.wait(60)
    blocks_of.stop()
    wait_until(lambda: not set(threading.enumerate()) - before, longest_secs=60)


def test_a_store_that_goes_on_failing_is_an_error(store, cache, monkeypatch, no_waiting):
    monkeypatch.setattr(blocks, "clock", lambda: no_waiting[0])
    batches = train_iterator(store, cache)
    monkeypatch.setenv(slow_store.FAIL_EVERY, "1")  # every request
    with pytest.raises(StorageError, match=r"slow:///.*tfrecord.*503 Service") as error:
        next(batches)
    assert "config.data.read_timeout_secs=600" in str(error.value)
    assert no_waiting[0] >= 600
    batches.close()
    assert not folders_in(cache)
    # The store is available again.
    monkeypatch.delenv(slow_store.FAIL_EVERY)
    check_same(batches, train_iterator(store), 1)
    batches.close()


def test_a_damaged_record_is_named_and_those_around_it_are_read(tmp_path, cache):
    path = tmp_path / "a-0.tfrecord"
    make.write_shard(path, (b"record %d" % number for number in range(BLOCK)))
    data = bytearray(path.read_bytes())
    second = TFRecordSource(tmp_path).extent(0, 1)[2]
    for damaged_byte in (second + 13, second + 2):  # in the contents, in the length
        path.write_bytes(data[:damaged_byte] + b"\xff" + data[damaged_byte + 1 :])
        source = TFRecordSource(tmp_path)
        blocks_of = BlockStore(source, block_order(source), section(cache))
        blocks_of.start()
        found = [blocks_of.read(number, fetch=True) for number in (0, 2, 9)]
        assert found == [b"record 0", b"record 2", b"record 9"]
        with pytest.raises(DamagedRecordError, match="record 1"):
            blocks_of.read(1)
        blocks_of.stop()


def test_a_full_disk_is_an_error_that_names_the_keys(store, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    batches = train_iterator(store, cache)
    monkeypatch.setattr(blocks.os, "replace", full)
    with pytest.raises(StorageError, match=r"No space left on device.*config.data.cache_dir"):
        next(batches)
    batches.close()
    # A partly written block does not keep the disk full.
    (blocks_of,) = batches.block_stores
    blocks_of.start()
    with pytest.raises(StorageError):
        blocks_of.read(0, fetch=True)
    # Threads that fetch other blocks may still be running.
    wait_until(lambda: not list(blocks_of.folder.glob("*.part")))
    blocks_of.stop()


def test_a_folder_that_cannot_be_written_to_is_named(store, tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.cache_dir=.*missing: .* is no folder"):
        train_iterator(store, tmp_path / "missing")
