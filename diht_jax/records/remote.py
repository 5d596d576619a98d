"""TFRecord shards in an object store (`gs://`, `s3://`, `memory://`, anything fsspec knows).

Local files are read without fsspec.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from concurrent import futures
from typing import Any

import numpy as np

from diht_jax.records.format import INDEX_SUFFIX, decode_index, encode_index, walk_offsets
from diht_jax.storage.atomic_file import temporary_path
from diht_jax.storage.retries import retry
from diht_jax.storage.stores import is_remote, open_file, open_system, read_range, read_whole

_DOWNLOAD_BYTES = 2**25  # of one request
_DOWNLOAD_THREADS = 8
# What object stores call the version of a file, the most telling name first.
_VERSIONS = ("etag", "ETag", "generation", "mtime", "LastModified", "updated", "created")
# File system and folder -> the listing that it remembers, and the same by the names of the files.
_listings: dict[tuple[int, str], tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]] = {}


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
    return list(list_sizes(pattern))


def list_sizes(pattern: str) -> dict[str, int | None]:
    """As `list_files`, with the bytes of each file where the store states them; one listing."""
    system, path = open_system(pattern)
    system.invalidate_cache(path)  # other processes may have written there

    def look() -> list[dict[str, Any]]:
        if is_glob(path):
            return list(system.glob(path, detail=True).values())
        if os.path.splitext(path)[1] and system.isfile(path):
            return [system.info(path)]  # some stores list a file by listing its whole folder
        return system.ls(path, detail=True)

    try:
        infos = retry(look, pattern)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    files = [info for info in infos if info["type"] != "directory"]
    return {system.unstrip_protocol(info["name"]): info.get("size") for info in files}


def is_glob(path: str) -> bool:
    """Whether a path or URL is a pattern."""
    return any(letter in path for letter in "*?[")


def exists(path: str) -> bool:
    """Whether there is a file or folder, local or in a store."""
    if not is_remote(path):
        return os.path.exists(path)
    system, name = open_system(path)
    return retry(lambda: system.exists(name), path)


def read_bytes(path: str) -> bytes:
    """A whole file, local or in a store.

    Raises:
        FileNotFoundError: there is none.
    """
    if not is_remote(path):
        with open(path, "rb") as file:
            return file.read()
    return read_whole(path)


def copy_once(
    url: str,
    name: str,
    num_bytes: int,
    folder: str | os.PathLike[str] | None = None,
    alternative: str = "",
) -> str:
    """A copy of a file on this host; the processes of a host, and later runs, share it.

    Args:
        url: of the file.
        name: of the copy; it stands for the contents.
        num_bytes: of the file.
        folder: gets the copy; None is a folder of this user in the system's temporary one.
        alternative: what else may help where there is no room, for the message.

    Returns:
        Path of the copy.

    Raises:
        ValueError: there is no room for it.
    """
    cache = pathlib.Path(folder or f"{tempfile.gettempdir()}/diht_jax-{os.getuid()}")
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = cache / name
    with open(cache / f".{name}.lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists() and path.stat().st_size == num_bytes:
            return str(path)
        if shutil.disk_usage(cache).free < num_bytes:
            raise ValueError(
                f"{cache} has no room for {url} ({num_bytes:,} bytes); name another folder by "
                f"config.data.cache_dir{alternative}"
            )
        temporary = temporary_path(path)
        try:
            _download(url, temporary, num_bytes)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return str(path)


def _download(url: str, path: pathlib.Path, num_bytes: int) -> None:
    """Copies a file by several requests at a time."""
    with (
        open(path, "xb", buffering=0) as file,
        futures.ThreadPoolExecutor(_DOWNLOAD_THREADS) as pool,
    ):

        def copy(start: int) -> None:
            end = min(start + _DOWNLOAD_BYTES, num_bytes)
            data = read_range(url, start, end)
            if os.pwrite(file.fileno(), data, start) != end - start:
                raise ValueError(f"{url}: it was written again while it was being read; try again")

        for _ in pool.map(copy, range(0, num_bytes, _DOWNLOAD_BYTES)):
            pass
        os.fsync(file.fileno())


def count_records(path: str, size: int | None = None) -> tuple[int, int, np.ndarray | None]:
    """Record count, size in bytes, and the offsets where no index could be written.

    Args:
        path: URL of the shard.
        size: in bytes; None costs a request.
    """
    size = file_size(path) if size is None else size
    offsets = read_index(path, size)
    if offsets is not None:
        return len(offsets), size, None
    offsets = _scan(path, size)
    system, _ = open_system(path)
    with contextlib.suppress(OSError):
        system.pipe_file(path + INDEX_SUFFIX, encode_index(offsets, size))
        return len(offsets), size, None
    return len(offsets), size, offsets


def find_remote_offsets(path: str, size: int, *, trust_index: bool = True) -> np.ndarray:
    """uint64 [n], where the records of a shard begin: of the index beside it, or by a scan."""
    offsets = read_index(path, size) if trust_index else None
    return _scan(path, size) if offsets is None else offsets


class RemoteFile:
    """A file in a store; every read is one ranged request."""

    def __init__(self, path: str, num_bytes: int | None = None):
        """Of a URL, and its size; None costs a request."""
        self._path = path
        self.size = file_size(path) if num_bytes is None else num_bytes

    def read_range(self, start: int, end: int) -> bytes:
        """Some bytes of the file."""
        return read_range(self._path, start, end)


def read_index(path: str, size: int) -> np.ndarray | None:
    """The offsets of the index beside a shard in a store; None where there is none."""
    try:
        data = read_whole(path + INDEX_SUFFIX)
    except FileNotFoundError:
        return None
    return decode_index(path, data, size)


def _scan(path: str, size: int) -> np.ndarray:
    with open_file(path) as file:

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
    return int(retry(lambda: system.size(name), path))


def file_version(url: str) -> tuple[int, str | None]:
    """Bytes of a file in a store, and its version there; None where the store states none.

    Raises:
        FileNotFoundError: there is none.
    """
    system, name = open_system(url)
    info = _find_listed(system, name) or retry(lambda: system.info(name), url)
    return int(info["size"]), next((str(info[key]) for key in _VERSIONS if info.get(key)), None)


def _find_listed(system: Any, name: str) -> dict[str, Any] | None:
    """What the listing that a file system remembers has of a file; None where it remembers none.

    The file system would find it too, but looks through the whole listing for each file.
    """
    folder = name.rpartition("/")[0]
    try:
        listing = system.dircache[folder]
    except (AttributeError, KeyError):
        return None
    known, by_name = _listings.get((id(system), folder), (None, {}))
    if known is not listing:
        by_name = {info["name"]: info for info in listing if info["type"] != "directory"}
        _listings[id(system), folder] = listing, by_name
    return by_name.get(name)
