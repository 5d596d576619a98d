"""Pipes, sockets and links that lead nowhere, where files are expected: nobody waits for them."""

import os
import socket

import pytest

from diht_jax.readers.registry import open_source
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
