"""Files of an output folder, on a local disk or in any store that fsspec knows (`s3://`, `gs://`).

Paths and URLs are texts here, and every function takes both. A file appears whole or not at all,
and is seen by others at once: no listing of a store is remembered. What fails for a moment is tried
again (`diht_jax.storage.retries`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, TypeVar

from diht_jax.storage import stores
from diht_jax.storage.atomic_file import sync_file, temporary_path
from diht_jax.storage.retries import read_file, retry
from diht_jax.storage.stores import is_remote, open_system, write_bytes

__all__ = [
    "exists",
    "join",
    "list_names",
    "list_sizes",
    "local_output",
    "make_folder",
    "map_many",
    "read_bytes",
    "read_many",
    "read_object",
    "remove",
    "rename",
    "size",
    "write_bytes",
    "write_object",
]

# Stores whose folders must be made before a file is written; in the others a name is enough.
_HAVE_FOLDERS = ("file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs", "arrow_hdfs")

_READ_THREADS, _READ_AHEAD = 32, 256  # of small files in a store

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def join(folder: str | os.PathLike[str], *names: str) -> str:
    """The path or URL of a file below a folder."""
    folder = os.fspath(folder)
    if not is_remote(folder):
        return os.path.join(folder, *names)
    return "/".join([folder.rstrip("/"), *names])


def exists(path: str) -> bool:
    """Whether there is such a file."""
    return size(path) is not None


def size(path: str) -> int | None:
    """Bytes of a file; None where it is missing.

    Raises:
        StorageError: it cannot be looked at, now and after some attempts.
    """
    try:
        if not is_remote(path):
            return retry(lambda: os.path.getsize(path), path)
        return _call(path, lambda system, name: int(system.info(name)["size"] or 0))
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_bytes(path: str) -> bytes:
    """The contents of a file.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read, now and after some attempts.
    """
    if not is_remote(path):
        return read_file(path)
    return stores.read_whole(path)


def read_many(paths: Sequence[str]) -> Iterator[bytes]:
    """The contents of files in their order; of a store by many requests at once.

    Yields:
        One at a time; few are held. Errors as of `read_bytes`.
    """
    yield from map_many(read_bytes, paths, paths[0] if paths else "")


def map_many(
    function: Callable[[_Item], _Result], items: Sequence[_Item], where: str
) -> Iterator[_Result]:
    """A function's result for every item, in their order; for a store many are asked for at once.

    Args:
        function: looks at a small file; called by threads where the files are in a store.
        items: what it is given.
        where: one of the files, or their folder.

    Yields:
        One at a time; few are held.
    """
    if not is_remote(where):
        yield from map(function, items)
        return
    with futures.ThreadPoolExecutor(_READ_THREADS) as pool:
        for start in range(0, len(items), _READ_AHEAD):
            yield from pool.map(function, items[start : start + _READ_AHEAD])


def read_object(path: str) -> dict[str, Any] | None:
    """The JSON object in a file; None where the file is missing or has something else.

    Raises:
        StorageError: it cannot be read, now and after some attempts: it may be there, and whole.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        return None
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def write_object(path: str, value: Mapping[str, Any]) -> None:
    """Writes JSON for people and programs, atomically.

    A name that is not UTF-8, which Python holds with lone surrogates, comes back as it was.
    """
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = json.dumps(value, indent=1, sort_keys=True).encode()
    write_bytes(path, data + b"\n")


def list_names(folder: str, wanted: Callable[[str], bool] = bool) -> list[str]:
    """Names of the files in a folder, sorted, hidden ones too; none where it is missing.

    Args:
        folder: path or URL.
        wanted: whether a name is; of a large folder the others take no memory.
    """
    if not is_remote(folder):
        try:
            with os.scandir(folder) as entries:
                return sorted(e.name for e in entries if wanted(e.name) and e.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []
    return sorted(name for name, _ in _list_remote(folder) if wanted(name))


def list_sizes(folder: str, wanted: Callable[[str], bool] = bool) -> dict[str, int]:
    """Bytes of the files in a store's folder by name, as its listing says; see `list_names`."""
    return {name: int(info["size"] or 0) for name, info in _list_remote(folder) if wanted(name)}


def _list_remote(folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names of the files in a store's folder, with what the store says of each."""
    try:
        infos = _call(folder, lambda system, name: system.ls(name, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return
    _, path = open_system(folder)
    prefix = f"{path.strip('/')}/"
    for info in infos:
        name = info["name"].lstrip("/")
        # Some stores list a file as itself, and a folder as an empty file in it.
        if info["type"] == "file" and name.startswith(prefix) and name != prefix:
            yield name.removeprefix(prefix), info


def remove(path: str) -> None:
    """Removes a file, if it is there."""
    if is_remote(path):
        stores.remove(path)
    else:
        pathlib.Path(path).unlink(missing_ok=True)


def rename(path: str, new: str) -> None:
    """Gives a file another name, if it is there; an old file of that name is replaced."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            _call(path, lambda system, name: system.mv(name, open_system(new)[1]), "renamed")
        else:
            os.replace(path, new)


def make_folder(folder: str) -> None:
    """Makes a folder, and those above it, where it is missing."""
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)
    elif folder.split("://", 1)[0] in _HAVE_FOLDERS:
        _call(folder, lambda system, name: system.makedirs(name, exist_ok=True), "made")


@contextlib.contextmanager
def local_output(path: str) -> Iterator[pathlib.Path]:
    """A file that has its name once the block has ended well; an old one is replaced then.

    Args:
        path: of the file; a local folder must exist.

    Yields:
        Where the block writes a file: a temporary name beside a local path, or in the system's
        temporary folder for a URL, from where it is uploaded.

    Raises:
        StorageError: the store does not take it, now and after some attempts.
    """
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="diht_jax-") as folder:
            local = pathlib.Path(folder) / path.rsplit("/", 1)[1]
            yield local
            stores.upload(local, path)
        return
    temporary = temporary_path(pathlib.Path(path))
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _call(url: str, function: Callable[[Any, str], _Result], participle: str = "read") -> _Result:
    """Calls a function with the store of a URL and the path there, and again after a failure."""
    system, name = open_system(url, use_listings_cache=False)
    return retry(lambda: function(system, name), url, participle)
