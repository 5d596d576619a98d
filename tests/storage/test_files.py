"""Files of an output folder: on a disk, in fsspec's memory, and on an S3 server (moto)."""

import errno
import os
import threading

import fsspec
import pytest

from data_prep.decisions import table
from data_prep.filtering.config import SETTINGS
from data_prep.filtering.resharding import BalancedShard, load_written
from data_prep.jobs.shards import STATS_SUFFIX, ShardTask, check_all
from diht_jax.storage import files, stores
from diht_jax.storage.stores import StorageError
from tests.readers.failing_disk import FailingDisk
from tests.records.stores import MeteredStore


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "local":
        path = str(tmp_path / "out")
    elif request.param == "memory":
        path = "memory:///files/out"
    else:
        path = f"{request.getfixturevalue('s3_bucket')}/files/out"
    files.make_folder(path)
    yield path
    for name in files.list_names(path):
        files.remove(files.join(path, name))


def test_a_file_is_written_listed_read_and_removed(folder):
    path = files.join(folder, "part.tfrecord")
    assert files.list_names(folder) == []
    assert (files.exists(path), files.size(path)) == (False, None)
    with pytest.raises(FileNotFoundError):
        files.read_bytes(path)
    files.write_bytes(path, b"old")
    files.write_bytes(path, b"new contents")
    files.write_bytes(files.join(folder, ".hidden"), b"")
    assert files.read_bytes(path) == b"new contents"
    assert (files.exists(path), files.size(path)) == (True, 12)
    assert files.size(files.join(folder, ".hidden")) == 0
    assert files.list_names(folder) == [".hidden", "part.tfrecord"]
    assert files.list_names(files.join(folder, "missing")) == []
    files.remove(path)
    files.remove(path)
    assert files.list_names(folder) == [".hidden"]
    # Files of sub-folders are not listed.
    below = files.join(folder, "parts")
    files.make_folder(below)
    files.write_bytes(files.join(below, "a.json"), b"{}")
    assert files.list_names(folder) == [".hidden"]
    assert files.list_names(below) == files.list_names(f"{below}/") == ["a.json"]
    files.remove(files.join(below, "a.json"))


def test_an_object_that_cannot_be_read_is_not_taken_for_missing(tmp_path):
    path = tmp_path / "a.json"
    assert files.read_object(str(path)) is None
    for data in (b"half {", b"[1]", b"\xff", b"[" * 100_000):
        path.write_bytes(data)
        assert files.read_object(str(path)) is None, data[:10]
    path.write_bytes(b'{"a": 1}')
    assert files.read_object(str(path)) == {"a": 1}
    task = ShardTask(None, str(tmp_path / "part"), "hash")
    shard = BalancedShard(str(tmp_path / "part"), (), "hash", False)
    for name in (f"part{STATS_SUFFIX}", table.MANIFEST, SETTINGS):
        (tmp_path / name).write_text("{}")
    for read in (
        lambda: files.read_object(str(path)),
        lambda: next(check_all([task])),
        lambda: next(load_written([shard])),
        lambda: table.read_manifest(str(tmp_path)),
        lambda: files.read_object(str(tmp_path / SETTINGS)),
    ):
        with FailingDisk(tmp_path, 10**9).mounted(), pytest.raises(StorageError):
            read()


def test_an_output_appears_whole_or_not_at_all(folder):
    path = files.join(folder, "report.html")
    with pytest.raises(RuntimeError, match="killed"), files.local_output(path) as local:
        local.write_bytes(b"half")
        raise RuntimeError("killed")
    assert files.list_names(folder) == []
    with files.local_output(path) as local:
        local.write_bytes(b"whole")
        assert files.list_names(folder) in ([], [local.name])
    assert files.read_bytes(path) == b"whole"
    assert files.list_names(folder) == ["report.html"]
    assert not local.exists()


def test_what_another_process_writes_is_seen(s3_bucket):
    folder = f"{s3_bucket}/files/seen"
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(f"{folder}/a", b"1")
    assert files.list_names(folder) == ["a"]
    other.pipe_file(f"{folder}/b", b"22")
    assert files.list_names(folder) == ["a", "b"]
    other.pipe_file(f"{folder}/a", b"333")
    assert files.size(files.join(folder, "a")) == 3
    other.rm(folder, recursive=True)
    assert files.list_names(folder) == []


def test_one_listing_is_one_request():
    for number in range(3):
        files.write_bytes(f"metered://listed/{number}", b"x")
    MeteredStore.requests.clear()
    assert files.list_names("metered://listed") == ["0", "1", "2"]
    assert MeteredStore.counts() == {"list": 1}


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["scandir", "unlink"])
def test_a_disk_that_is_away_for_a_moment_changes_nothing(tmp_path, monkeypatch, name, number):
    real, failures = getattr(os, name), [OSError(number, os.strerror(number))]

    def fails_once(*args, **options):
        if failures:
            raise failures.pop()
        return real(*args, **options)

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(stores, "sleep", lambda secs: None)
    monkeypatch.setattr(os, name, fails_once)
    assert files.list_names(str(tmp_path)) == ["a"]
    files.remove(str(tmp_path / "a"))
    assert files.list_names(str(tmp_path)) == []
    assert not failures


def test_an_object_with_a_checksum_is_none_once_it_is_another(tmp_path):
    path, value = str(tmp_path / "x.json"), {"b": [1, 0.1, None], "a": {"é": "\udcff"}}
    files.write_object(path, value, with_checksum=True)
    assert files.read_object(path) == value
    whole = (tmp_path / "x.json").read_text()
    (tmp_path / "x.json").write_text(whole.replace("0.1", "0.2"))
    assert files.read_object(path) is None
    (tmp_path / "x.json").write_text("".join(whole.split()))  # formatted differently
    assert files.read_object(path) == value


@pytest.mark.parametrize("reader", ["file", "map"])
def test_an_abandoned_reader_ends_while_a_thread_still_reads(monkeypatch, reader):
    """The garbage collector may end it while a thread starts; a wait for a thread would hang."""
    reading, go_on = threading.Event(), threading.Event()

    def read(number):
        if number:
            reading.set()
            assert go_on.wait(60)
        return bytes(stores.BLOCK_BYTES)

    monkeypatch.setattr(stores, "BLOCK_BYTES", 4)
    monkeypatch.setattr(stores, "read_range", lambda url, start, end: read(start // 4))
    if reader == "file":
        file = stores.RangesFile("memory://any", 12, in_blocks=True)
        assert file.read(2) == bytes(2)
        close = file.close
    else:
        mapped = files.map_many(read, range(100))
        assert next(mapped) == bytes(4)
        close = mapped.close
    assert reading.wait(60)
    ended = threading.Thread(target=lambda: (close(), go_on.set()))
    ended.start()
    assert go_on.wait(20), "it waits for the thread that reads"
    ended.join()
