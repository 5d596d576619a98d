"""Shards: TFRecord framing against the specification, ArrayRecord against grain, and damage."""

import concurrent.futures
import os
import pathlib
import pickle
import random

import fsspec
import numpy as np
import pytest
from grain.sources import ArrayRecordDataSource

from diht_jax.input.order import BlockOrder
from diht_jax.records import schema, sharded
from diht_jax.records.catalog import find_kind, find_shards
from diht_jax.records.formats import (
    FORMATS,
    ArrayRecordSource,
    TFRecordSource,
    TFRecordWriter,
    open_writer,
    read_array_records,
)
from diht_jax.records.shard_files import (
    SUFFIXES,
    DamagedRecordError,
    ShardIndex,
    TFRecordError,
    read_records,
)
from diht_jax.records.train_data import describe_changes, fingerprint_records, open_records
from diht_jax.storage.stores import StorageError
from tests import make
from tests.fuzz import framing
from tests.readers.failing_disk import FailingDisk


def _index(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(path.name + ".idx")


_RECORDS = [b"", b"a", b"hello world", bytes(1000), b"\x00\xff" * 7]


def test_writer_frames_records_and_their_offsets(tmp_path):
    path = make.write_shard(tmp_path / "a.tfrecord", _RECORDS)
    frames = list(map(framing.frame, _RECORDS))
    assert path.read_bytes() == b"".join(frames)
    assert _index(path).read_bytes() == framing.index(frames)
    assert sorted(os.listdir(tmp_path)) == ["a.tfrecord", "a.tfrecord.idx"]


def test_a_shard_without_index_on_a_disk_that_is_away_for_a_moment(tmp_path):
    path = make.write_shard(tmp_path / "a.tfrecord", _RECORDS)
    _index(path).unlink()
    with FailingDisk(tmp_path, 2, spared=3).mounted() as disk:
        assert len(TFRecordSource(path)) == len(_RECORDS) and disk.failures == 0
        _index(path).unlink()
        disk.failures = 10**9
        with pytest.raises(StorageError, match=r"a\.tfrecord: could not be read"):
            TFRecordSource(path)


def test_nothing_is_visible_before_close_nor_after_an_error(tmp_path):
    path = tmp_path / "a.tfrecord"
    writer = TFRecordWriter(path)
    writer.write(b"x")
    assert not path.exists()
    writer.discard()
    assert os.listdir(tmp_path) == []

    make.write_shard(path, [b"old"])
    with pytest.raises(KeyError), TFRecordWriter(path) as writer:
        writer.write(b"new")
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == ["a.tfrecord", "a.tfrecord.idx"]
    assert list(TFRecordSource(path)) == [b"old"]


def _many_shards(folder: pathlib.Path) -> list[bytes]:
    expected = []
    for shard, count in enumerate([3, 0, 5, 1, 4]):
        records = [f"{shard}/{i}".encode() * (i + 1) for i in range(count)]
        make.write_shard(folder / f"pairs-train-{shard:05d}.tfrecord", records)
        expected += records
    return expected


def test_random_access_over_shards(tmp_path):
    expected = _many_shards(tmp_path)
    source = TFRecordSource(tmp_path)
    assert len(source) == len(expected) == 13
    assert list(source) == expected
    for index in random.Random(0).sample(range(13), 13):
        assert source[np.int64(index)] == expected[index]
    for index in (-1, 13, 10**6):
        with pytest.raises(IndexError):
            source[index]
    assert source.locate(3) == (str(tmp_path / "pairs-train-00002.tfrecord"), 0)
    assert list(TFRecordSource(str(tmp_path / "*-0000[02].tfrecord"))) == expected[:8]
    last_first = [tmp_path / "pairs-train-00004.tfrecord", tmp_path / "pairs-train-00000.tfrecord"]
    assert list(TFRecordSource(last_first)) == expected[9:] + expected[:3]


@pytest.mark.parametrize("where", ["", "absent", "*.tfrecord", []])
def test_nothing_found(tmp_path, where):
    paths = where if isinstance(where, list) else str(tmp_path / where)
    with pytest.raises(ValueError, match="no TFRecord shard"):
        TFRecordSource(paths)


def test_pickled_and_read_by_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "_MAX_OPEN_SHARDS", 2)  # shards open and close all along
    expected = _many_shards(tmp_path)
    source = pickle.loads(pickle.dumps(TFRecordSource(tmp_path)))
    order = random.Random(0).choices(range(13), k=2000)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert list(pool.map(source.__getitem__, order)) == [expected[i] for i in order]


# Errors of a disk, and of a web server, whose client has its own error classes.
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), RuntimeError("405")])
def test_missing_index_stays_in_memory_where_it_cannot_be_written(tmp_path, monkeypatch, error):
    path = make.write_shard(tmp_path / "a.tfrecord", _RECORDS)
    _index(path).unlink()

    def refuse(*_):
        raise error

    # Tests may run as root, to whom permissions do not apply.
    monkeypatch.setattr(ShardIndex, "write", refuse)
    source = pickle.loads(pickle.dumps(TFRecordSource(path)))
    assert list(source) == _RECORDS
    assert not _index(path).exists()


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("missing_bytes", [1, 13, 30])
def test_truncated_shard(tmp_path, missing_bytes, with_index):
    # Frames of 21 and 22 bytes.
    path = make.write_shard(tmp_path / "a.tfrecord", [b"first", b"second"])
    data = path.read_bytes()
    path.write_bytes(data[:-missing_bytes])
    if not with_index:
        _index(path).unlink()
    record = 1 if missing_bytes < 22 else 0
    with pytest.raises(TFRecordError, match=rf"a\.tfrecord: record {record} is truncated"):
        TFRecordSource(path)
    with pytest.raises(TFRecordError, match=rf"a\.tfrecord: record {record} is truncated"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"PK\x03\x04 this is a zip archive", "not a TFRecord file"),
        (b"short", "not a TFRecord file"),
        (b"\x1f\x8b\x08\x00" + bytes(30), "compressed with gzip"),
    ],
)
def test_not_a_tfrecord(tmp_path, data, kind):
    path = tmp_path / "a.tfrecord"
    path.write_bytes(data)
    with pytest.raises(TFRecordError, match=rf"a\.tfrecord: record 0: the file is {kind}"):
        TFRecordSource(path)


def test_pickle_leaves_the_offsets_on_disk(tmp_path):
    source = TFRecordSource(make.write_shard(tmp_path / "a.tfrecord", [b"x"] * 5000))
    assert len(pickle.dumps(source)) < 1000


def test_folders_globs_and_lists(tmp_path):
    for name in (
        "tar/00000.tar",
        "tar/00000.parquet",
        "both/a.tar",
        "both/a.tfrecord",
        "odd/a.bin",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_kind(tmp_path / "tar") == find_kind(f"{tmp_path}/t*/*") == "webdataset"
    assert find_kind([f"{tmp_path}/tar", f"{tmp_path}/both/*.tar"]) == "webdataset"
    assert find_kind(str(tmp_path / "both")) == "tfrecord"  # the default format
    assert find_kind(str(tmp_path / "odd" / "a.bin")) == "tfrecord"
    assert find_shards(tmp_path / "tar") == [str(tmp_path / "tar" / "00000.tar")]
    with pytest.raises(ValueError, match=r"no record shard at '.*/odd'"):
        find_kind(tmp_path / "odd")
    with pytest.raises(ValueError, match="are webdataset, tfrecord; name those of one format"):
        find_kind([str(tmp_path / "tar"), str(tmp_path / "both")])


@pytest.mark.parametrize("kind", FORMATS)
def test_a_shard_in_a_store_is_the_local_one_and_appears_whole(kind, tmp_path):
    name = f"a{SUFFIXES[kind]}"
    records = [
        schema.encode_record(schema.Pair(f"k{n}", b"\xff\xd8" + bytes(n), "c")) for n in range(9)
    ]
    system, url = fsspec.filesystem("memory"), f"memory://writers/{name}"
    for path in (str(tmp_path / name), url):
        with open_writer(path) as writer:
            for record in records:
                writer.write(record)
            assert len(writer) == len(records)
    local = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {i["name"].rsplit("/")[-1]: system.cat(i["name"]) for i in system.ls("writers")} == local
    with pytest.raises(RuntimeError), open_writer(url) as writer:
        writer.write(records[0])
        raise RuntimeError
    assert system.cat_file(url) == local[name]
    writer.close()
    assert system.cat_file(url) == local[name]
    system.rm("writers", recursive=True)


def _write(folder, counts=(5, 0, 3)):
    records = []
    for number, count in enumerate(counts):
        shard = [f"record {number} {i}".encode() * 50 for i in range(count)]
        make.write_shard(folder / f"x-train-{number:05d}.array_record", shard)
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
    # After a restart of a file server, every read by the reader's descriptor fails.
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
    # A failing disk raises the same error in its reader, so the disk is checked first.
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
