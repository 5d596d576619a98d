"""Failing disks, decompression bombs, and pipes and links in place of files."""

import errno
import os
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.filter import run_filter
from diht_jax.evaluation.sources.files import read_text
from diht_jax.readers.registry import open_source
from diht_jax.records import tars
from diht_jax.storage import stores
from tests.data_prep.filtering.jobs import job_config, read_records
from tests.make import png
from tests.readers.failing_disk import FailingDisk
from tests.readers.inputs import PNG, read_entries, skip_reasons, write_source, write_tar

_KEYS = [f"k{number}" for number in range(6)]


# Form -> numbers of reads that succeed before the disk fails.
_SOURCES = {
    "jsonl": (0, 1, 2, 4),
    "tar": (0, 1, 2, 4),
    "tar.gz": (0,),
    "parquet": (0, 1),
    "tfrecord": (0,),
    "classes": (0, 3),
}
_CASES = [(form, spared) for form, counts in _SOURCES.items() for spared in counts]


def _write(folder, form):
    # Tars of images of many blocks, so that the disk is read repeatedly.
    image = PNG * 5000 if form.startswith("tar") else PNG
    return str(write_source(folder, form, dict.fromkeys(_KEYS, image)))


@pytest.mark.parametrize(("form", "spared"), _CASES)
def test_a_moment_without_the_disk_loses_nothing(tmp_path, form, spared):
    spec = _write(tmp_path, form)
    expected = [(p.key, p.image, p.caption) for p in open_source(spec)]
    assert len(expected) == len(_KEYS)
    with FailingDisk(tmp_path, len(stores.DELAYS_SECS), spared).mounted() as disk:
        source = open_source(spec)
        assert [(p.key, p.image, p.caption) for p in source] == expected
    assert not source.skipped
    assert not disk.failures
    assert disk.slept == sum(stores.DELAYS_SECS)


@pytest.mark.parametrize(("form", "spared"), _CASES)
def test_an_outage_is_an_error_that_does_not_speak_of_damage(tmp_path, form, spared):
    spec = _write(tmp_path, form)
    with (
        FailingDisk(tmp_path, 10**9, spared).mounted() as disk,
        pytest.raises(stores.StorageError, match=f"{tmp_path}.*could not be read") as caught,
    ):
        list(open_source(spec))
    assert not disk.spared
    for wrong in ("damaged", "write it again", "cut off"):
        assert wrong not in str(caught.value)
    assert isinstance(caught.value, OSError)  # so that an engine retries the task


def test_only_a_missing_picture_is_no_image(tmp_path):
    path, pictures = _write(tmp_path, "jsonl"), tmp_path / "i"
    (pictures / "k1.png").unlink()
    (pictures / "k2.png").unlink()
    (pictures / "k2.png").mkdir()
    assert skip_reasons(read_entries(path, key_column="id")) == {
        "k1": "no_image",
        "k2": "no_image",
    }
    with (
        FailingDisk(pictures / "k0.png", 10**9, error=errno.EACCES).mounted() as disk,
        pytest.raises(
            stores.StorageError, match=r"k0\.png: could not be read \(Permission denied\)"
        ),
    ):
        read_entries(path, key_column="id")
    assert disk.slept == 0  # waiting does not change a permission


def test_a_damaged_file_is_not_taken_for_a_bad_disk(tmp_path):
    tar, parquet = (pathlib.Path(_write(tmp_path, form)) for form in ("tar.gz", "parquet"))
    tar.write_bytes(tar.read_bytes()[:-100])
    data = bytearray(parquet.read_bytes())
    data[4:40] = b"\xff" * 36
    parquet.write_bytes(data)
    for path in (tar, parquet):
        with pytest.raises(ValueError, match=str(path)) as caught:
            list(open_source(str(path)))
        assert not isinstance(caught.value, stores.StorageError)


def test_a_small_parquet_of_giant_rows_is_refused_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_UNPACKED_BYTES", 2**24)
    zeros = bytes(2**22)
    path = tmp_path / "bomb.parquet"
    table = pyarrow.table({"jpg": [zeros], "txt": ["x"]}).take([0] * 64)
    with pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
        writer.write_table(table)
    assert path.stat().st_size < 10_000
    pyarrow_bytes = pyarrow.total_allocated_bytes()
    entries = []
    with pytest.raises(ValueError, match=r"bomb\.parquet: unpacks to over 16 MiB"):
        for entry in open_source(str(path)):
            entries.append(entry.key)
            # Arrow never holds many rows at once.
            assert pyarrow.total_allocated_bytes() - pyarrow_bytes < 2**25
    assert len(entries) == 4


def test_a_small_tar_of_giant_members_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_UNPACKED_BYTES", 2**22)
    path = tmp_path / "bomb.tar.gz"
    write_tar(path, ((f"{key}.png", bytes(2**20)) for key in range(64)), "w:gz")
    assert path.stat().st_size < 2**17
    with pytest.raises(ValueError, match=r"bomb\.tar\.gz: unpacks to over \d+ MiB"):
        read_entries(str(path))
    # A gzip file with the compression ratio of captions is not refused.
    members = [(f"{key}.txt", b"the same words again " * 50) for key in range(1000)]
    write_tar(tmp_path / "text.tar.gz", members, "w:gz")
    assert len(read_entries(str(tmp_path / "text.tar.gz"))) == 1000


_SUFFIXES = (".tar", ".tar.gz", ".tfrecord", ".array_record", ".parquet", ".jsonl", ".json", ".csv")


_KINDS = {
    "pipe": os.mkfifo,
    "nowhere": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
}


@pytest.mark.parametrize("make", _KINDS.values(), ids=_KINDS)
@pytest.mark.parametrize("suffix", _SUFFIXES)
def test_what_is_no_ordinary_file_is_an_error_with_its_name(tmp_path, suffix, make):
    path = tmp_path / f"x{suffix}"
    make(path)
    with pytest.raises((ValueError, OSError), match=f"x{suffix}"):
        list(open_source(str(tmp_path / f"*{suffix}")))


@pytest.mark.parametrize("make", _KINDS.values(), ids=_KINDS)
def test_what_is_no_picture_among_classes_or_captions_in_files_is_counted(tmp_path, make):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_bytes(png())
    make(tmp_path / "dog" / "b.png")
    assert skip_reasons(read_entries(str(tmp_path))) == {"dog/b.png": "no_image"}
    for name in ("a", "b"):
        (tmp_path / "dog" / f"{name}.txt").write_text(name)
    assert skip_reasons(read_entries(str(tmp_path))) == {"dog/b": "no_image"}


def test_links_among_the_folders_that_lead_to_themselves_are_left_out(tmp_path):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_bytes(png())
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dog" / "self").symlink_to(".")
    (tmp_path / "best").symlink_to(".")
    assert [pair.key for pair in read_entries(str(tmp_path))] == ["dog/a.png"]
    (tmp_path / "dog" / "a.txt").write_text("one")
    assert [pair.caption for pair in read_entries(str(tmp_path))] == ["one"]


def test_what_is_no_table_costs_the_filter_only_itself(tmp_path):
    tables, bad = tmp_path / "in", tmp_path / "in" / "a.csv"
    tables.mkdir()
    os.mkfifo(bad)
    (tables / "x.png").write_bytes(png())
    (tables / "b.csv").write_text("image,caption\nx.png,a dog\n")
    failures = run_filter(job_config(str(tables), tmp_path / "out", max_failed_shards=1))
    assert list(failures) == [str(bad)]
    assert [record.caption for record in read_records(tmp_path / "out")] == ["a dog"]


def test_a_pipe_that_a_user_names_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"list\.txt: a pipe"):
        read_text(str(tmp_path / "list.txt"))
