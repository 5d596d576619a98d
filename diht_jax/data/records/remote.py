"""TFRecord shards in an object store (`gs://`, `s3://`, `memory://`, anything fsspec knows).

Local files are read without fsspec.
"""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any

import numpy as np

from diht_jax.data.records.format import (
    INDEX_SUFFIX,
    TFRecordError,
    decode_index,
    encode_index,
    unframe,
    walk_offsets,
    wrong_index,
)
from diht_jax.data.retries import retry

# Read at once where a shard has no index and must be walked through.
_SCAN_BLOCK_BYTES = 2**22
# What object stores call the version of a file, the most telling name first.
_VERSIONS = ("etag", "ETag", "generation", "mtime", "LastModified", "updated", "created")


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as `gs://bucket/train-00000.tfrecord`."""
    return "://" in path


def refuse_url(path: str | os.PathLike[str] | None, name: str) -> None:
    """Raises ValueError for an output that would need an object store.

    Args:
        path: where something is to be written; None passes.
        name: of the flag or argument, such as "--output".
    """
    if path is not None and is_remote(os.fspath(path)):
        raise ValueError(
            f"{name}={os.fspath(path)}: this is written to local or mounted folders only; write it "
            "to one, and copy it to the store"
        )


def list_files(pattern: str) -> list[str]:
    """URLs of the files that are meant by a file's, a folder's or a glob's URL; maybe none.

    Raises:
        ValueError: nothing installed knows such URLs.
    """
    system, path = open_system(pattern)
    if system.isfile(path):
        found = [path]
    elif any(letter in path for letter in "*?["):
        found = system.glob(path)
    else:
        found = system.ls(path, detail=False) if system.isdir(path) else []
    return [system.unstrip_protocol(name) for name in found]


def exists(path: str) -> bool:
    """Whether there is a file or folder, local or in a store."""
    if not is_remote(path):
        return os.path.exists(path)
    system, name = open_system(path)
    return system.exists(name)


def read_bytes(path: str) -> bytes:
    """A whole file, local or in a store.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    system, name = open_system(path)
    return system.cat_file(name)


def count_records(path: str) -> tuple[int, int, np.ndarray | None]:
    """Record count, size in bytes, and the offsets where no index could be written."""
    size = file_size(path)
    offsets = _read_index(path, size)
    if offsets is not None:
        return len(offsets), size, None
    offsets = _scan(path, size)
    system, _ = open_system(path)
    with contextlib.suppress(OSError):
        system.pipe_file(path + INDEX_SUFFIX, encode_index(offsets, size))
        return len(offsets), size, None
    return len(offsets), size, offsets


class RemoteShard:
    """One shard with its offsets; every record is one ranged request."""

    def __init__(self, path: str, offsets: np.ndarray | None):
        self.path = path
        self.size = file_size(path)
        if offsets is None:
            offsets = _read_index(path, self.size)
        self.offsets = _scan(path, self.size) if offsets is None else offsets

    def read(self, record: int) -> bytes:
        """The bytes of a record.

        Raises:
            TFRecordError: the record is damaged, or the index is another shard's.
        """
        if record >= len(self.offsets):
            raise wrong_index(self.path, f"record {record}: the shard or its index was replaced")
        data = unframe(self.read_range(*self.extent(record)), self.path, record)
        if data is None:
            raise TFRecordError(
                f"{self.path}: record {record} is not where its index says, or its length is "
                f"damaged; delete {self.path}{INDEX_SUFFIX} to have it made again, or write the "
                "shard again"
            )
        return data

    def extent(self, record: int) -> tuple[int, int]:
        """First byte and end of a record's frame."""
        is_last = record + 1 == len(self.offsets)
        return int(self.offsets[record]), self.size if is_last else int(self.offsets[record + 1])

    def read_range(self, start: int, end: int) -> bytes:
        """Some bytes of the shard."""
        system, path = open_system(self.path)
        return retry(lambda: system.cat_file(path, start=start, end=max(start, end)), self.path)


def _read_index(path: str, size: int) -> np.ndarray | None:
    system, _ = open_system(path)
    try:
        data = system.cat_file(path + INDEX_SUFFIX)
    except FileNotFoundError:
        return None
    return decode_index(path, data, size)


def _scan(path: str, size: int) -> np.ndarray:
    system, name = open_system(path)
    with system.open(name, "rb", block_size=_SCAN_BLOCK_BYTES) as file:

        def read_at(position: int, length: int) -> bytes:
            file.seek(position)
            return file.read(length)

        return walk_offsets(path, size, read_at)


def file_size(path: str) -> int:
    """Bytes of a file, local or in a store.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        return os.path.getsize(path)
    system, name = open_system(path)
    return int(system.size(name))


def file_version(url: str) -> tuple[int, str | None]:
    """Bytes of a file in a store, and its version there; None where the store states none.

    Raises:
        FileNotFoundError: there is none.
    """
    system, name = open_system(url)
    info = system.info(name)
    return int(info["size"]), next((str(info[key]) for key in _VERSIONS if info.get(key)), None)


def open_system(url: str) -> tuple[Any, str]:
    """The fsspec file system that a URL belongs to, and its path there.

    Raises:
        ValueError: nothing installed knows such URLs.
    """
    system = _file_system(url.split("://", 1)[0])
    return system, system._strip_protocol(url)


@functools.cache
def _file_system(protocol: str) -> Any:
    # Not at the top: whoever trains on local files needs none of it.
    import fsspec

    try:
        return fsspec.filesystem(protocol)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{protocol}:// cannot be read: {error}. gs:// needs `pip install gcsfs`, s3:// needs "
            "`pip install s3fs`"
        ) from error
