"""Pipes, sockets and links that lead nowhere, where files are expected: nobody waits for them."""

import os
import socket

import pytest

from data_prep.filter import run_filter
from diht_jax.evaluation.sources.files import read_text
from diht_jax.readers.registry import open_source
from tests.data_prep.filtering.jobs import job_config, read_records
from tests.make import png
from tests.readers.inputs import read_entries, skip_reasons

_SUFFIXES = (".tar", ".tar.gz", ".tfrecord", ".array_record", ".parquet", ".jsonl", ".json", ".csv")


def _make_pipe(path):
    os.mkfifo(path)


def _make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


_KINDS = {
    "pipe": _make_pipe,
    "socket": _make_socket,
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
def test_what_is_no_picture_in_a_folder_of_pictures_is_counted(tmp_path, make):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_bytes(png())
    make(tmp_path / "dog" / "b.png")
    assert skip_reasons(read_entries(str(tmp_path))) == {"dog/b.png": "no_image"}


@pytest.mark.parametrize("make", _KINDS.values(), ids=_KINDS)
def test_what_is_no_picture_among_captions_in_files_is_counted(tmp_path, make):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "a.png").write_bytes(png())
    make(tmp_path / "b.png")
    assert skip_reasons(read_entries(str(tmp_path))) == {"b": "no_image"}


def test_links_among_the_folders_that_lead_to_themselves_are_left_out(tmp_path):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.png").write_bytes(png())
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dog" / "self").symlink_to(".")
    assert [pair.key for pair in read_entries(str(tmp_path))] == ["dog/a.png"]
    (tmp_path / "dog" / "a.txt").write_text("one")
    assert [pair.caption for pair in read_entries(str(tmp_path))] == ["one"]


@pytest.mark.parametrize("make", _KINDS.values(), ids=_KINDS)
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_what_is_no_table_costs_the_filter_only_itself(tmp_path, suffix, make):
    tables, bad = tmp_path / "in", tmp_path / "in" / f"a{suffix}"
    tables.mkdir()
    make(bad)
    (tables / "x.png").write_bytes(png())
    row = {".csv": "image,caption\nx.png,a dog\n", ".jsonl": '{"image":"x.png","caption":"a dog"}'}
    (tables / f"b{suffix}").write_text(row[suffix])
    failures = run_filter(job_config(str(tables), tmp_path / "out", max_failed_shards=1))
    assert list(failures) == [str(bad)]
    assert [record.caption for record in read_records(tmp_path / "out")] == ["a dog"]


def test_a_pipe_that_a_user_names_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "list.txt")
    with pytest.raises(ValueError, match=r"list\.txt: a pipe"):
        read_text(str(tmp_path / "list.txt"))
