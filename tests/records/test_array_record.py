"""ArrayRecord shards: random access against grain's own reader, and what is refused."""

import os
import pathlib
import pickle

import fsspec
import pytest
from grain.sources import ArrayRecordDataSource

from diht_jax.input.order import BlockOrder
from diht_jax.records.formats import (
    ArrayRecordSource,
    open_writer,
    read_array_records,
)
from diht_jax.records.shard_files import DamagedRecordError, TFRecordError
from diht_jax.records.train_data import describe_changes, fingerprint_records, open_records
from diht_jax.storage.stores import StorageError
from tests.readers.failing_disk import FailingDisk


def _write(folder, counts=(5, 0, 3)):
    records = []
    for number, count in enumerate(counts):
        shard = [f"record {number} {i}".encode() * 50 for i in range(count)]
        with open_writer(folder / f"x-train-{number:05d}.array_record") as writer:
            for record in shard:
                writer.write(record)
            assert len(writer) == count
        records += shard
    return records


def test_records_are_those_that_grain_reads(tmp_path):
    records = _write(tmp_path)
    source = open_records(str(tmp_path))
    assert isinstance(source, ArrayRecordSource)
    theirs = ArrayRecordDataSource([path for path in source.paths if "00001" not in path])
    again = pickle.loads(pickle.dumps(source))
    for number, record in enumerate(records):
        assert source[number] == again[number] == theirs[number] == record
    assert source.shard_lengths.tolist() == [5, 0, 3]
    assert source.locate(6) == (str(tmp_path / "x-train-00002.array_record"), 1)
    assert source.block_starts(2).tolist() == [0, 2, 4, 5, 7, 8]
    BlockOrder(source.block_starts(2), 0, num_streams=2, window_blocks=1)
    with pytest.raises(ValueError, match='00000.array_record: .* config.data.order="global"'):
        source.extent(0, 2)
    with pytest.raises(IndexError):
        source[8]
    before = fingerprint_records(source)
    assert fingerprint_records(again) == before
    _write(tmp_path, (5, 0, 4))
    now = fingerprint_records(ArrayRecordSource(tmp_path))
    assert describe_changes(before, now) == ["1 changed (x-train-00002.array_record)"]


def test_a_reader_whose_descriptor_is_stale_is_opened_again(tmp_path):
    records = _write(tmp_path, (4,))
    source = ArrayRecordSource(tmp_path)
    assert source[0] == records[0]
    # As after a restart of a file server: no read by the reader's descriptor succeeds.
    folder = pathlib.Path("/proc/self/fd")
    stale = [int(fd) for fd in os.listdir(folder) if _leads_to(folder / fd, tmp_path)]
    assert stale
    with open(os.devnull, "wb") as unreadable:
        for descriptor in stale:
            os.dup2(unreadable.fileno(), descriptor)
    assert [source[number] for number in range(4)] == records


def _leads_to(descriptor, folder):
    return os.path.exists(descriptor) and os.readlink(descriptor).startswith(str(folder))


def test_damage_is_named(tmp_path):
    records = _write(tmp_path, (4,))
    path = tmp_path / "x-train-00000.array_record"
    data = bytearray(path.read_bytes())
    data[data.find(records[2]) + 7] ^= 1
    path.write_bytes(data)
    source = ArrayRecordSource(path)
    assert source[1] == records[1] and source[3] == records[3]
    with pytest.raises(DamagedRecordError, match="00000.array_record: record 2 cannot be read"):
        source[2]
    with pytest.raises(DamagedRecordError, match="00000.array_record: record 2 cannot be read"):
        list(read_array_records(str(path)))
    # Its reader has the same error where the disk fails, which is looked at before damage is named.
    with FailingDisk(tmp_path, 10**9).mounted():
        with pytest.raises(StorageError):
            list(read_array_records(str(path)))
        with pytest.raises(StorageError):
            source[2]
    path.write_bytes(data[:5000])
    with FailingDisk(tmp_path, 10**9).mounted(), pytest.raises(StorageError):
        ArrayRecordSource(path)
    with pytest.raises(TFRecordError, match="not a whole ArrayRecord shard; write or copy it"):
        ArrayRecordSource(path)
    fsspec.filesystem("memory").pipe_file("memory://a/b.array_record", bytes(data))
    with pytest.raises(ValueError, match="memory:.*/a/b.array_record: .* local or mounted"):
        ArrayRecordSource("memory://a/b.array_record")
