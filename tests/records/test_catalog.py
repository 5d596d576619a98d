"""Blocks of shards; a `dataset.index`, its checks at a start, and messages about a new folder."""

import os
import pathlib
import re
import shutil

import fsspec
import numpy as np
import pytest

from diht_jax.data.index import update_index
from diht_jax.records.catalog import open_catalog
from diht_jax.records.formats import TFRecordSource, open_source
from diht_jax.records.schema import Pair
from diht_jax.records.shard_files import TFRecordError
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.train_data import fingerprint_records
from diht_jax.storage.stores import read_range
from tests import make
from tests.fuzz import framing
from tests.readers.inputs import JPEG
from tests.records.stores import MeteredStore

RECORDS = [np.random.default_rng(i).bytes(i % 50) for i in range(500)]


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "kept"
    folder.mkdir()
    for shard in range(4):
        make.write_shard(
            folder / f"part-{shard}.tfrecord", RECORDS[shard * 125 : shard * 125 + 125]
        )
    update_index(folder)
    return folder


@pytest.fixture
def url(folder):
    system = fsspec.filesystem("metered")
    for path in folder.iterdir():
        system.pipe_file(f"/kept/{path.name}", path.read_bytes())
    MeteredStore.requests.clear()
    yield "metered:///kept"
    system.rm("/kept", recursive=True)


def without_index(folder: pathlib.Path) -> TFRecordSource:
    """Returns a source of the same shards without a `dataset.index`."""
    other = folder.parent / "other"
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("dataset.index"))
    return TFRecordSource(other)


def test_the_file_is_as_its_format_is_described(tmp_path):
    random, frames = np.random.default_rng(0), {}
    for number, count in enumerate((130, 0, 64, 1, 200)):
        records = [random.bytes(int(random.integers(0, 90))) for _ in range(count)]
        path = make.write_shard(tmp_path / f"part-{number}.tfrecord", records)
        frames[path.name] = list(map(framing.frame, records))
    rows = fingerprint_records(TFRecordSource(tmp_path)).shards  # from the shards themselves
    update_index(tmp_path)
    head, offsets = framing.dataset_index(frames, [int(digest, 16) for *_, digest in rows])
    assert (tmp_path / "dataset.index").read_bytes() == framing.with_preamble(head) + offsets


def test_the_head_of_an_index_has_a_checksum(tmp_path):
    folder = make.write_records(tmp_path / "kept", 6, [3, 3])
    update_index(folder)
    path, data = folder / "dataset.index", (folder / "dataset.index").read_bytes()
    preamble, offsets = 24, 6 * 8  # bytes before and behind the head
    for position in range(preamble, len(data) - offsets):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        with pytest.raises(ValueError, match=rf"{path}: .*the checksum of its table differs"):
            TFRecordSource(folder)


def test_an_indexed_folder_has_the_records_and_the_fingerprint_of_its_shards(folder, url):
    plain = without_index(folder)
    for source in (TFRecordSource(folder), TFRecordSource(url), TFRecordSource(f"{url}/part-*")):
        assert repr(source) == repr(plain)
        assert fingerprint_records(source) == fingerprint_records(plain)
        assert [source[number] for number in range(500)] == RECORDS
        for block in (64, 100):
            starts = source.block_starts(block)
            assert starts.tolist() == plain.block_starts(block).tolist()
            for first, last in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
                path, start, end = source.extent(first, last)
                data = (folder / os.path.basename(path)).read_bytes()[start:end]
                assert list(source.split(first, last, data)) == RECORDS[first:last]
    part = TFRecordSource([folder / "part-2.tfrecord", folder / "part-0.tfrecord"])
    assert [part[number] for number in (0, 125)] == [RECORDS[250], RECORDS[0]]


def test_a_shard_that_is_named_with_two_slashes_comes_once(folder):
    assert len(TFRecordSource([f"{folder}//part-{shard}.tfrecord" for shard in (1, 3)])) == 250


def test_a_block_is_one_request_and_a_record_too_once_the_offsets_are_there(url, tmp_path):
    source = TFRecordSource(url)
    assert sum(MeteredStore.counts().values()) == 2  # a listing, and the index
    starts = source.block_starts(64).tolist()
    MeteredStore.requests.clear()
    for first, last in zip(starts[:-1], starts[1:], strict=True):
        path, start, end = source.extent(first, last)
        assert list(source.split(first, last, read_range(path, start, end))) == RECORDS[first:last]
    assert MeteredStore.counts() == {"get": len(starts) - 1}
    # Single records, with offsets that are read 64 at a time.
    MeteredStore.requests.clear()
    assert [source[number] for number in range(500)] == RECORDS
    assert 500 <= sum(MeteredStore.counts().values()) <= 500 + 4 * 2
    # With the offsets in a cache on this host, which two readers share.
    MeteredStore.requests.clear()
    for reader in (source, TFRecordSource(url)):
        MeteredStore.requests.clear()
        reader.make_offsets_local(tmp_path / "cache")
        downloads = MeteredStore.requests["get"]
        assert [reader[number] for number in range(500)] == RECORDS
        assert MeteredStore.counts() == {"get": 500 + downloads}
        assert downloads == (1 if reader is source else 0)
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1


def test_shards_that_changed_are_named_with_what_to_do(folder, url):
    system = fsspec.filesystem("metered")

    def write(name, data):
        system.pipe_file(f"/kept/{name}", data)
        (folder / name).write_bytes(data)

    def remove(name):
        system.rm_file(f"/kept/{name}")
        (folder / name).unlink()

    data = (folder / "part-1.tfrecord").read_bytes()
    write("part-1.tfrecord", (folder / "part-2.tfrecord").read_bytes())
    for path in (url, str(folder)):
        with pytest.raises(ValueError, match=r"dataset.index does not fit.* 1 changed \(part-1.tf"):
            TFRecordSource(path)
        TFRecordSource(f"{path}/part-0.tfrecord")
    write("part-1.tfrecord", data)
    write("part-9.tfrecord", data)
    remove("part-3.tfrecord")
    for path in (url, str(folder)):
        expected = rf"1 added \(part-9.tfrecord\); 1 removed \(part-3.*python -m .*index {path}`"
        with pytest.raises(ValueError, match=expected):
            TFRecordSource(path)
        assert len(TFRecordSource(f"{path}/part-[0-2].tfrecord")) == 375
        update_index(path)
        assert len(TFRecordSource(path)) == 500


@pytest.mark.parametrize("suffix", [".tfrecord", ".tar", ".array_record"])
def test_a_shard_that_became_a_copy_of_its_sibling_is_named(tmp_path, suffix):
    """Record lengths equal those in the index, and the records' own checksums are valid."""
    folder = tmp_path / "kept"
    folder.mkdir()
    pairs = [Pair(f"{i:03d}", JPEG, f"picture {i:03d}") for i in range(6)]
    for number in (0, 1):
        make.write_shard(folder / f"part-{number}{suffix}", pairs[3 * number :][:3])
    update_index(folder)
    source = open_source(folder)
    assert source.decode(source[5]).caption == "picture 005"
    shutil.copy(folder / f"part-0{suffix}", folder / f"part-1{suffix}")
    reads = [lambda source: source[5]]
    if suffix != ".array_record":  # ArrayRecord shards have no blocks
        assert (folder / f"part-0{suffix}").stat().st_size == source.extent(3, 6)[2]
        reads.append(lambda source: source.extent(3, 6))
    for read in reads:
        with pytest.raises(TFRecordError, match=rf"part-1{suffix} \(its first or last 4 KiB"):
            read(open_source(folder))
    source = open_source(folder)
    assert source.decode(source[2]).caption == "picture 002"


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.jsonl", "a.tar.gz"])
def test_sources_that_are_no_shards_name_the_command_that_converts_them(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1")
    command = r"data_prep\.filter --config prep/convert --config\.input="
    for source in (tmp_path / name, tmp_path, tmp_path / "a.*"):
        with pytest.raises(ValueError, match=rf"{command}.?{re.escape(str(source))}"):
            open_catalog(source)


def test_tars_are_found_by_names_in_capitals(tmp_path):
    (tmp_path / "tars").mkdir()
    make.write_shard(tmp_path / "tars" / "A.tar", [Pair("1", JPEG, "one")])
    os.replace(tmp_path / "tars" / "A.tar", tmp_path / "tars" / "A.TAR")
    for path in (tmp_path / "tars", tmp_path / "tars" / "A.TAR"):
        source = open_source(path)
        assert [source.decode(element).caption for element in source] == ["one"]


class Counted(ShardedRecords):
    """Shards of given lengths, without contents."""

    def __init__(self, lengths):
        """Takes the number of records of each shard."""
        self._starts = np.cumsum([0, *lengths])

    def __getitem__(self, index):
        raise NotImplementedError


def divide(lengths: list[int], block_records: int) -> list[int]:
    """Returns the limits of the blocks, shard by shard."""
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
