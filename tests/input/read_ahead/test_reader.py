"""The reader fetches each planned block once, in time and within its bound; no processes here."""

import collections

import numpy as np
import pytest

from diht_jax.input.block_order import BlockOrder
from diht_jax.input.read_ahead import block_cache, reader
from diht_jax.input.read_ahead.block_cache import (
    BlockCache,
    CachedRecords,
    ReadAheadStopped,
    claim_folder,
    new_folder,
)
from diht_jax.input.read_ahead.reader import Reader, ReadSettings
from diht_jax.records.tfrecord import DamagedRecordError, TFRecordSource, TFRecordWriter
from diht_jax.storage.retries import StorageError

BATCH, STREAMS, WINDOW, BLOCK = 8, 4, 3, 8


@pytest.fixture
def source(tmp_path) -> TFRecordSource:
    """Three shards of 203 records of different lengths."""
    for shard, count in enumerate((70, 69, 64)):
        with TFRecordWriter(tmp_path / f"a-{shard}.tfrecord") as writer:
            for number in range(count):
                writer.write(f"record {shard} {number} ".encode() * (1 + number % 3))
    return TFRecordSource(tmp_path)


@pytest.fixture
def fetched(monkeypatch) -> collections.Counter:
    """Counts the extents that were read."""
    counts = collections.Counter()
    read = reader.read_extent

    def counting(*extent):
        counts[extent] += 1
        return read(*extent)

    monkeypatch.setattr(reader, "read_extent", counting)
    return counts


class Host:
    """A reader and the records that the workers of its host see."""

    def __init__(self, source, tmp_path, position=0, index=0, count=1, **settings):
        starts = source.block_starts(BLOCK)
        self.source = source
        self.order = BlockOrder(starts, 7, num_streams=STREAMS, window_blocks=WINDOW)
        self.folder = new_folder(tmp_path)
        self._lock = claim_folder(self.folder)
        self.cache = BlockCache.create(self.folder, len(starts) - 1)
        self.cache["position"] = position
        self.index, self.count = index, count
        given = {"ahead": 3 * BATCH, "plan_step": BATCH, "batch_size": BATCH, "num_threads": 4}
        given |= {"bound_bytes": 10**9, "timeout_secs": 60.0}
        self.settings = ReadSettings(**(given | settings), process_index=index, process_count=count)
        self.records = CachedRecords(DirectReads(source), starts, self.folder)
        self.restart()

    def restart(self):
        self.reader = Reader(
            self.cache, self.source, self.order, self.settings, start=lambda run: run()
        )

    def settle(self):
        """Steps until nothing is missing."""
        for _ in range(50):
            self.reader.step(0)

    def take(self, position):
        """The records of the batch at a position, checked against the source."""
        for index in range(position + self.index, position + BATCH, self.count):
            number = self.order[index]
            assert self.records[number] == self.source[number]

    def advance(self, position):
        self.cache["position"] = position

    @property
    def files(self):
        return {int(p.name.removeprefix("block_")) for p in self.folder.glob("block_*")}

    @property
    def direct(self):
        return self.records._source.indices


class DirectReads:
    """A source that notes which records are read one by one."""

    def __init__(self, source):
        self._source = source
        self.indices = []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self.indices.append(index)
        return self._source[index]

    def __getattr__(self, name):
        return getattr(self._source, name)


def test_each_block_is_fetched_once_an_epoch_and_nothing_is_read_directly(
    source, tmp_path, fetched
):
    host = Host(source, tmp_path)
    position = 0
    while position < 3 * len(source):
        host.settle()
        # Workers decode ahead of the position.
        host.take(position)
        host.take(position + BATCH)
        position += BATCH
        host.advance(position)
    assert host.direct == []
    starts = source.block_starts(BLOCK)
    extents = {source.extent(int(a), int(b)) for a, b in zip(starts[:-1], starts[1:], strict=True)}
    assert fetched.keys() == extents
    # What two streams share comes at both times; what the plan reaches into is of the fourth epoch.
    planned = host.order.upcoming_blocks(0, 3 * len(source), 0, 1)
    assert fetched.total() <= len(planned) + 2 * STREAMS * WINDOW
    assert fetched.total() >= 3 * len(extents)


def test_blocks_are_deleted_once_their_last_record_was_used(source, tmp_path):
    host = Host(source, tmp_path)
    for position in range(0, 2 * len(source), BATCH):
        host.advance(position)
        host.settle()
        needed = host.order.upcoming_blocks(position, host.settings.ahead + 8 * BATCH, 0, 1)
        assert host.files <= {block for block, _, _ in needed}
        assert set(np.flatnonzero(host.cache.states)) == host.files
    assert host.cache["bytes"] == sum(
        source.extent(*host.reader._records(block))[2]
        - source.extent(*host.reader._records(block))[1]
        for block in host.files
    )


def test_hosts_fetch_the_blocks_of_their_own_streams(source, tmp_path):
    hosts = [Host(source, tmp_path, index=index, count=2) for index in range(2)]
    for position in range(0, len(source) // BATCH * BATCH, BATCH):
        for host in hosts:
            host.advance(position)
            host.settle()
            host.take(position)
    assert [host.direct for host in hosts] == [[], []]
    blocks = len(source.block_starts(BLOCK)) - 1
    total = sum(host.cache["blocks"] for host in hosts)
    assert blocks <= total <= blocks + 2 * STREAMS * (WINDOW + 1)


def test_the_bound_holds_and_what_does_not_fit_is_read_directly(source, tmp_path):
    bound = 1_000  # a window of one stream has about as much
    host = Host(source, tmp_path, bound_bytes=bound)
    for position in range(0, len(source), BATCH):
        host.advance(position)
        for _ in range(50):
            host.reader.step(0)
            held = [host.folder / f"block_{block}" for block in host.files]
            places = 8 * (BLOCK + BLOCK // 2 + 1)  # the table of the largest block
            assert sum(path.stat().st_size - places for path in held) <= bound
        host.take(position)
    assert 0 < host.cache["peak_bytes"] <= bound
    assert host.direct and host.cache["is_full"]


def test_a_plan_begins_at_any_position(source, tmp_path):
    host = Host(source, tmp_path, position=17 * BATCH)
    host.settle()
    host.take(17 * BATCH)
    assert not host.direct


def test_records_beyond_the_plan_are_read_directly(source, tmp_path):
    host = Host(source, tmp_path)
    host.settle()
    far = next(n for n in range(len(source)) if host.cache.states[_block(host, n)] == 0)
    assert host.records[far] == source[far]
    assert host.direct == [far]
    with pytest.raises(IndexError):
        host.records[len(source)]


def _block(host, number):
    return np.searchsorted(host.order.block_starts, number, side="right") - 1


def test_a_worker_waits_for_a_block_that_is_planned(source, tmp_path, monkeypatch):
    host = Host(source, tmp_path)
    pauses = []
    monkeypatch.setattr(
        block_cache, "sleep", lambda secs: pauses.append(secs) or host.reader.step(0)
    )
    host.take(0)
    assert pauses and not host.direct


def test_before_the_first_plan_is_there_a_worker_waits(source, tmp_path, monkeypatch):
    host = Host(source, tmp_path)
    host.cache["is_planned"] = 0
    host.cache.states[:] = 0
    monkeypatch.setattr(block_cache, "sleep", lambda secs: host.cache.__setitem__("is_planned", 1))
    assert host.records[3] == source[3]
    assert host.direct == [3]


def test_no_folder_is_no_read_ahead(source, tmp_path):
    records = CachedRecords(source, source.block_starts(BLOCK), tmp_path / "missing")
    assert [records[number] for number in range(203)] == list(source)
    assert records.locate(100) == source.locate(100) and repr(records) == repr(source)


def test_a_lasting_failure_ends_the_waiting(source, tmp_path, monkeypatch):
    host = Host(source, tmp_path)
    monkeypatch.setattr(block_cache, "sleep", lambda secs: host.cache.fail("gs://bucket: 503"))
    with pytest.raises(StorageError, match="gs://bucket: 503"):
        host.take(0)
    with pytest.raises(StorageError, match="gs://bucket: 503"):
        host.take(BATCH)


def test_a_stop_ends_the_waiting(source, tmp_path, monkeypatch):
    host = Host(source, tmp_path)
    monkeypatch.setattr(block_cache, "sleep", lambda secs: host.cache.__setitem__("is_stopped", 1))
    with pytest.raises(ReadAheadStopped):
        host.take(0)


def test_a_reader_that_is_started_again_keeps_what_is_there(source, tmp_path, fetched):
    host = Host(source, tmp_path)
    host.settle()
    before = fetched.copy()
    assert before
    # Killed while it wrote one block, and had requested another.
    first, second, *_ = sorted(host.files)
    for block in (first, second):
        (host.folder / f"block_{block}").unlink()
        host.cache.states[block] = block_cache.PLANNED
    (host.folder / f".block_{second}.1-00.tmp").write_bytes(b"half")
    host.restart()
    host.settle()
    assert fetched.total() == before.total() + 2
    host.take(0)
    assert not host.direct
    assert not list(host.folder.glob(".*.tmp"))


def test_a_damaged_record_is_an_error_of_its_own(source, tmp_path):
    path = tmp_path / "a-1.tfrecord"
    data = bytearray(path.read_bytes())
    _, start, end = source.extent(75, 76)
    data[end - 6] ^= 1
    path.write_bytes(data)
    host = Host(TFRecordSource(tmp_path), tmp_path, ahead=203)
    host.settle()
    assert host.records[74] == source[74] and host.records[76] == source[76]
    with pytest.raises(DamagedRecordError, match=r"a-1\.tfrecord: record 5 is damaged"):
        host.records[75]
    assert host.direct == []


def test_an_extent_that_comes_too_short_is_an_error(monkeypatch):
    calls = []

    class Cutting:
        def cat_file(self, name, start, end):
            calls.append(name)
            return bytes(end - start - (len(calls) == 1))

    monkeypatch.setattr(reader, "is_remote", lambda path: True)
    monkeypatch.setattr(reader, "open_system", lambda path: (Cutting(), path))
    with pytest.raises(OSError, match="9 bytes came instead of 10"):
        reader.read_extent("gs://a", 0, 10)
    assert reader.read_extent("gs://a", 0, 10) == bytes(10)


def test_a_cache_that_cannot_be_written_names_its_key(source, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    host = Host(source, tmp_path)
    monkeypatch.setattr(host.cache, "write", full)
    with pytest.raises(StorageError, match=r"No space left.*config\.data\.cache_dir"):
        host.settle()


def test_folders_of_runs_that_were_killed_are_deleted(source, tmp_path):
    host = Host(source, tmp_path)
    stale = tmp_path / "diht_jax_blocks_0123"
    stale.mkdir()
    (stale / "lock").touch()
    (stale / "block_0").touch()
    other = tmp_path / "unrelated"
    other.mkdir()
    claim_folder(new_folder(tmp_path))
    assert host.folder.exists() and other.exists() and not stale.exists()
