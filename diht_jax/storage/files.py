"""File operations on local paths and on URLs of any store that fsspec supports (`s3://`, `gs://`).

Most functions accept both. Writes are atomic, and other processes see a new file immediately,
since listings of output folders are not cached. Transient errors are retried
(`diht_jax.storage.stores`).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent import futures
from typing import Any, TypeVar

from diht_jax.storage.stores import (
    check_ordinary,
    forget_input,
    is_missing,
    is_remote,
    naming_output,
    note_input,
    open_system,
    read_whole,
    retry,
)

# Protocols with real folders, which must exist before a file is written into them.
_HAVE_FOLDERS = ("file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs", "arrow_hdfs")
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")  # names made by `temporary_path`
_CHECKSUM = "checksum"
_READ_THREADS = 32  # concurrent reads of small files in a store
# Limit for encoded images that wait for a thread; an ordinary batch needs a tenth of it.
_WAITING_BYTES = 2**28
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def join(folder: str | os.PathLike[str], *names: str) -> str:
    """Joins the path or URL of a folder with further names."""
    folder = os.fspath(folder)
    if not is_remote(folder):
        return os.path.join(folder, *names)
    return "/".join([folder.rstrip("/"), *names])


def is_glob(path: str) -> bool:
    """Returns whether a path or URL is a glob pattern."""
    return not set("*?[").isdisjoint(path)


def exists(path: str) -> bool:
    """Returns whether a file or folder exists."""
    return size(path) is not None


def size(path: str) -> int | None:
    """Returns the current bytes of a file, or None if it is missing; other errors as in `retry`."""
    try:
        if not is_remote(path):
            return retry(functools.partial(os.path.getsize, path), path)
        return _call(path, lambda system, name: int(system.info(name)["size"] or 0))
    except (FileNotFoundError, NotADirectoryError):
        return None


def stat(path: str | os.PathLike[str]) -> os.stat_result:
    """Returns the `os.stat` result of a local file; other errors are those of `stores.retry`.

    Raises:
        FileNotFoundError: the file is missing or a broken link.
    """
    try:
        return retry(functools.partial(os.stat, path), path)
    except OSError as error:
        if not is_missing(error):
            raise
        reason = "a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise FileNotFoundError(f"{os.fspath(path)}: {reason}") from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Reads a whole file.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the path is a pipe, a socket or a device.
        StorageError: the file cannot be read, even after retries.
    """
    name = os.fspath(path)
    if is_remote(name):
        return read_whole(name)

    def read() -> bytes:
        check_ordinary(name)
        with open(name, "rb") as file:
            return file.read()

    return retry(read, name)


def map_many(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    where: str | None = None,
    *,
    num_threads: int = _READ_THREADS,
    ahead: int = _READ_THREADS - 1,
    num_bytes: Callable[[_Item], int] | None = None,
) -> Generator[_Result]:
    """Maps a function over items and yields the results in order, holding only a few at a time.

    A thread pool calls the function, unless `where`, a file or folder that it reads, is local.

    Args:
        num_threads: size of the pool.
        ahead: items in flight at a time; fewer if by `num_bytes` they take much memory.
    """
    if where is not None and not is_remote(where):
        yield from map(function, items)
        return
    waiting: collections.deque[tuple[futures.Future[_Result], int]] = collections.deque()
    waiting_bytes = 0
    pool = futures.ThreadPoolExecutor(num_threads)
    try:
        for item in items:
            size = num_bytes(item) if num_bytes else 0
            waiting.append((pool.submit(function, item), size))
            waiting_bytes += size
            while len(waiting) > ahead or waiting_bytes > _WAITING_BYTES:
                result, size = waiting.popleft()
                waiting_bytes -= size
                yield result.result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        # The garbage collector may get here while a thread starts, and then a wait for another
        # thread would never end.
        pool.shutdown(wait=False, cancel_futures=True)


def parse_json(data: bytes | str, kind: type = dict) -> Any:
    """Parses one JSON value, an object by default; raises ValueError for anything else.

    NaN and infinity, which JSON does not define, become None.
    """
    if isinstance(data, bytes):
        data = data.decode(json.detect_encoding(data), "surrogatepass")
    try:
        value = _JSON.decode(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, kind):
        raise ValueError(f"a JSON {type(value).__name__}; expected an object")
    return value


def _finite_or_none(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None


_JSON = json.JSONDecoder(parse_constant=lambda _: None, parse_float=_finite_or_none)


def read_object(path: str) -> dict[str, Any] | None:
    """Reads a JSON object from a file; returns None if it is missing or holds anything else.

    Errors are those of `stores.retry`, since a file that cannot be read may be intact.
    """
    try:
        return parse_checked_object(read_bytes(path))
    except FileNotFoundError:
        return None


def check_object(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parses the JSON object in a user's file; a ValueError for anything else names the file."""
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error!s:.200}") from error


def parse_checked_object(data: bytes, *, needs_checksum: bool = False) -> dict[str, Any] | None:
    """Parses a JSON object that this project wrote; returns None for anything else.

    Also returns None if the checksum (`add_checksum`) is wrong, or missing with `needs_checksum`.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict):
        return None
    stated = found.pop(_CHECKSUM, None)
    if stated is None:
        return None if needs_checksum else found
    return found if stated == add_checksum(found)[_CHECKSUM] else None


def add_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON-able object with the added key "checksum"; see `parse_checked_object`."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return {**value, _CHECKSUM: hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file into an existing folder, replacing an old file."""
    if is_remote(os.fspath(path)):
        _call(os.fspath(path), lambda system, name: system.pipe_file(name, data), "written")
        return
    with local_output(path) as local:
        local.write_bytes(data)


def write_object(
    path: str,
    value: Mapping[str, Any],
    *,
    with_checksum: bool = False,
    indent: int = 1,
    sort_keys: bool = True,
) -> None:
    """Writes a JSON file atomically, for people and programs.

    A name that is not UTF-8 (lone surrogates in Python) is escaped and survives the round trip.
    """
    if with_checksum:
        value = add_checksum(value)
    write = functools.partial(json.dumps, value, indent=indent, sort_keys=sort_keys)
    try:
        data = write(ensure_ascii=False).encode()
    except UnicodeEncodeError:
        data = write().encode()
    write_bytes(path, data + b"\n")


@contextlib.contextmanager
def local_output(path: str | os.PathLike[str]) -> Generator[pathlib.Path]:
    """Context manager that writes a file atomically: it gets its name if the block succeeds.

    An existing file is replaced. A local folder must exist.

    Yields:
        The path that the block writes to: a temporary name in the same folder. For a URL, it is in
        the system's temporary folder and is uploaded afterwards.

    Raises:
        FullError: there is not enough space.
        StorageError: the disk or the store failed.
    """
    if is_remote(os.fspath(path)):
        with tempfile.TemporaryDirectory(prefix="diht_jax-") as folder:
            local = pathlib.Path(folder) / os.fspath(path).rsplit("/", 1)[1]
            with naming_output(local):
                yield local
            upload(local, os.fspath(path))
        return
    temporary = temporary_path(path)
    try:
        with naming_output(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())  # all data reaches the disk before the rename
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a unique hidden file name in the same folder, which searches for files ignore."""
    path = pathlib.Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def remove_temporary_files(folder: str, wanted: Callable[[str], bool]) -> None:
    """Removes temporary files that killed processes left in a local folder; stores have none.

    `wanted` selects them by their final names. No other process may be writing them.
    """
    if is_remote(folder):
        return
    for name in list_names(folder, wanted=_TEMPORARY.fullmatch):
        found = _TEMPORARY.fullmatch(name)
        if found and wanted(found[1]):
            remove(join(folder, name))


def upload(path: str | os.PathLike[str], url: str) -> None:
    """Uploads a local file to a store atomically, replacing an old file."""
    _call(url, lambda system, name: system.put_file(os.fspath(path), name), "written")


def list_names(
    folder: str, ending: str | tuple[str, ...] = "", wanted: Callable[[str], object] = bool
) -> list[str]:
    """Returns the sorted names of the files in a folder, also hidden ones; [] if it is missing.

    Names are filtered by `ending` and `wanted` while listing, to save memory in large folders.
    """

    def look() -> list[str]:
        names = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(ending) and wanted(entry.name) and entry.is_file():
                    names.append(entry.name)
        return sorted(names)

    if not is_remote(folder):
        try:
            return retry(look, folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
    names = (name for name, _ in _list_remote(folder) if name.endswith(ending))
    return sorted(filter(wanted, names))


def list_sizes(folder: str, wanted: Callable[[str], bool] = bool) -> dict[str, int]:
    """Returns name -> bytes of the files in a store's folder, from a listing; see `list_names`."""
    return {name: int(info["size"] or 0) for name, info in _list_remote(folder) if wanted(name)}


def find_inputs(pattern: str) -> dict[str, int | None]:
    """Lists the files of a store at the URL of a file, a folder or a glob, with one listing.

    Afterwards, `input_version` needs no request for these files.

    Returns:
        URL -> bytes, or None if the store states no size. Empty if nothing matches.
    """
    system, path = open_system(pattern)
    system.invalidate_cache(path)  # other processes may have written files

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
    found = {}
    for info in infos:
        if info["type"] != "directory":
            url = system.unstrip_protocol(info["name"])
            note_input(url, info)
            found[url] = info.get("size")
    return found


def remove(path: str) -> None:
    """Removes a file if it exists."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            _call(path, lambda system, name: system.rm_file(name), "removed")
        else:
            retry(functools.partial(os.unlink, path), path, "removed")


def make_folder(folder: str) -> None:
    """Creates a folder and its parents if they are missing."""
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)
    elif folder.split("://", 1)[0] in _HAVE_FOLDERS:
        _call(folder, lambda system, name: system.makedirs(name, exist_ok=True), "made")


def refuse_url(path: str | os.PathLike[str] | None, name: str) -> None:
    """Raises ValueError for an output path in an object store; `name` is the flag of the path."""
    if path is not None and is_remote(os.fspath(path)):
        raise ValueError(
            f"{name}={os.fspath(path)}: this is written to local or mounted folders only; write it "
            "to one, and copy it to the store"
        )


def _list_remote(folder: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the names of the files in a store's folder, with the listing's entry for each."""
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


def _call(url: str, function: Callable[[Any, str], _Result], participle: str = "read") -> _Result:
    """Calls a function with a URL's file system and its path there, with retries."""
    system, name = open_system(url, use_listings_cache=False)
    result = retry(functools.partial(function, system, name), url, participle)
    if participle != "read":
        open_system(url)[0].invalidate_cache(name)  # the listings that inputs use
        forget_input(url)
    return result
