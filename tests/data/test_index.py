"""The command that indexes foreign shards: repeated, resumed, after changes, and in a store."""

import os
import shutil

import fsspec
import numpy as np
import pytest

from diht_jax.data.index import update_index
from diht_jax.records.formats import TFRecordSource
from tests import make
from tests.records.stores import MeteredStore

RECORDS = [np.random.default_rng(i).bytes(i % 50) for i in range(300)]


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of shards without an index."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    for shard in range(3):
        make.write_shard(
            folder / f"part-{shard}.tfrecord", RECORDS[shard * 100 : shard * 100 + 100]
        )
        os.remove(folder / f"part-{shard}.tfrecord.idx")
    return folder


def records_of(path) -> list[bytes]:
    source = TFRecordSource(path)
    return [source[number] for number in range(len(source))]


def test_one_file_is_written_and_a_second_run_finds_it_up_to_date(folder):
    shards = {path.name for path in folder.iterdir()}
    report = update_index(folder)
    assert (report.num_shards, report.num_records, report.num_read) == (3, 300, 3)
    assert {path.name for path in folder.iterdir()} == shards | {"dataset.index"}
    assert records_of(folder) == RECORDS
    before = os.stat(folder / "dataset.index")
    assert update_index(folder).num_read == 0
    assert os.stat(folder / "dataset.index") == before


def test_only_new_and_changed_shards_are_read_again(folder):
    update_index(folder)
    make.write_shard(folder / "part-1.tfrecord", [b"changed"])
    shutil.copy(folder / "part-0.tfrecord", folder / "part-3.tfrecord")
    os.remove(folder / "part-2.tfrecord")
    report = update_index(folder)
    assert report.num_read == 2 and len(report.changes) == 3
    assert records_of(folder) == [*RECORDS[:100], b"changed", *RECORDS[:100]]
    updated = (folder / "dataset.index").read_bytes()
    assert update_index(folder, overwrite=True).num_read == 3
    assert (folder / "dataset.index").read_bytes() == updated


def test_a_broken_shard_is_named_and_the_others_are_not_read_again(folder):
    good = (folder / "part-1.tfrecord").read_bytes()
    (folder / "part-1.tfrecord").write_bytes(good[:-3])
    with pytest.raises(ValueError, match=r"1 of 3 shards cannot be indexed: .*part-1.*truncated"):
        update_index(folder)
    assert not (folder / "dataset.index").exists()
    assert records_of(folder / "part-0.tfrecord") == RECORDS[:100]
    (folder / "part-1.tfrecord").write_bytes(good)
    # A partial index that was damaged in between is rebuilt.
    part = folder / ".dataset.index.parts" / "part-2.tfrecord.idx"
    part.write_bytes(part.read_bytes()[:-1])
    assert update_index(folder).num_read == 2
    assert records_of(folder) == RECORDS
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_to_overwrite_does_not_take_over_what_an_earlier_run_believed(folder):
    path = make.write_shard(folder / "part-0.tfrecord", [b"a" * 30, b"b" * 10])
    wrong = (folder / "part-0.tfrecord.idx").read_bytes()
    make.write_shard(path, [b"a" * 10, b"b" * 30])
    (folder / "part-0.tfrecord.idx").write_bytes(wrong)
    good = (folder / "part-1.tfrecord").read_bytes()
    (folder / "part-1.tfrecord").write_bytes(good[:-3])
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="1 of 3 shards"):
            update_index(folder, overwrite=overwrite)
    (folder / "part-1.tfrecord").write_bytes(good)
    # The next run reuses the results of the run with `overwrite`.
    assert update_index(folder).num_read == 1
    assert records_of(folder)[:2] == [b"a" * 10, b"b" * 30]


def test_folders_of_the_same_relative_path_share_no_work(tmp_path, monkeypatch):
    lengths = [(9, 7), (7, 9)]
    for name, own in zip("xy", lengths, strict=True):
        (tmp_path / name / "kept").mkdir(parents=True)
        make.write_shard(tmp_path / name / "kept" / "a.tfrecord", map(bytes, own))
    (tmp_path / "x" / "kept" / "b.tfrecord").write_bytes(b"no shard")
    monkeypatch.chdir(tmp_path / "x")
    with pytest.raises(ValueError, match="1 of 2 shards"):
        update_index("kept", work_dir=tmp_path)
    monkeypatch.chdir(tmp_path / "y")
    update_index("kept", work_dir=tmp_path)
    assert [len(record) for record in records_of("kept")] == [7, 9]


def test_shards_in_a_store(folder, tmp_path):
    system, url = fsspec.filesystem("metered"), "metered:///theirs"
    for path in folder.iterdir():
        system.pipe_file(f"/theirs/{path.name}", path.read_bytes())
    work = tmp_path / "work"
    assert update_index(url, work_dir=work).num_read == 3
    update_index(folder)
    assert system.cat_file("/theirs/dataset.index") == (folder / "dataset.index").read_bytes()
    assert records_of(url) == RECORDS and list(work.iterdir()) == []
    MeteredStore.requests.clear()
    assert update_index(url, work_dir=work).num_read == 0
    assert sum(MeteredStore.counts().values()) <= 4
    system.pipe_file("/theirs/part-3.tfrecord", (folder / "part-0.tfrecord").read_bytes())
    assert update_index(url, work_dir=work).num_read == 1
    assert records_of(url) == RECORDS + RECORDS[:100]
    system.rm("/theirs", recursive=True)


def test_what_cannot_be_indexed_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing' is no folder; expected one that holds shards"):
        update_index(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no shard; expected \*.tfrecord, "):
        update_index(tmp_path)
    assert list(tmp_path.iterdir()) == []
