"""Files by path or URL, on a local disk or in any store that fsspec knows (`s3://`, `gs://`).

Every function takes both. A file that is written appears whole or not at all, and others see it
at once: no listing is remembered of a folder that is written to. What fails for a moment is tried
again (`diht_jax.storage.stores`).
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

# Stores whose folders must be made before a file is written; in the others a name is enough.
_HAVE_FOLDERS = ("file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs", "arrow_hdfs")
_TEMPORARY = re.compile(r"\.(.+)\.\d+-[0-9a-f]{8}\.tmp")  # the names of `temporary_path`
_CHECKSUM = "checksum"
_READ_THREADS = 32  # small files in a store that are read at a time
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def join(folder: str | os.PathLike[str], *names: str) -> str:
    """The path or URL of a file below a folder."""
    folder = os.fspath(folder)
    if not is_remote(folder):
        return os.path.join(folder, *names)
    return "/".join([folder.rstrip("/"), *names])


def is_glob(path: str) -> bool:
    """Returns whether a path or URL is a pattern."""
    return not set("*?[").isdisjoint(path)


def exists(path: str) -> bool:
    """Returns whether there is such a file or folder."""
    return size(path) is not None


def size(path: str) -> int | None:
    """Bytes of a file as it is now; None where it is missing. Other errors are those of `retry`."""
    try:
        if not is_remote(path):
            return retry(functools.partial(os.path.getsize, path), path)
        return _call(path, lambda system, name: int(system.info(name)["size"] or 0))
    except (FileNotFoundError, NotADirectoryError):
        return None


def stat(path: str | os.PathLike[str]) -> os.stat_result:
    """Size and times of a local file; errors are those of `stores.retry`.

    Raises:
        FileNotFoundError: there is none, or it is a link that leads nowhere.
    """
    try:
        return retry(functools.partial(os.stat, path), path)
    except OSError as error:
        if not is_missing(error):
            raise
        reason = "a link that leads nowhere" if os.path.islink(path) else "no such file"
        raise FileNotFoundError(f"{os.fspath(path)}: {reason}") from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The contents of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is a pipe, a socket or a device.
        StorageError: it cannot be read, now and after some attempts.
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
    function: Callable[[_Item], _Result], items: Iterable[_Item], where: str | None = None
) -> Iterator[_Result]:
    """Yields a function's result for every item, in their order; few are held at a time.

    Threads call it, unless `where`, one of its files or their folder, is on a local disk.
    """
    if where is not None and not is_remote(where):
        yield from map(function, items)
        return
    waiting: collections.deque[futures.Future[_Result]] = collections.deque()
    with futures.ThreadPoolExecutor(_READ_THREADS) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == _READ_THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def parse_json(data: bytes | str, kind: type = dict) -> Any:
    """One JSON value, by default an object; a ValueError for anything else.

    NaN and infinity, which JSON lacks, become None.
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
    """The JSON object in a file; None where the file is missing or has something else.

    Errors are those of `stores.retry`: a file that cannot be read may be there, and whole.
    """
    try:
        return parse_checked_object(read_bytes(path))
    except FileNotFoundError:
        return None


def check_object(data: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in the bytes of a user's file; a ValueError that names it for others."""
    try:
        return parse_json(data)
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON object, got {error!s:.200}") from error


def parse_checked_object(data: bytes, *, needs_checksum: bool = False) -> dict[str, Any] | None:
    """The JSON object in the bytes of a file that this project wrote; None for anything else.

    An object with a checksum (`add_checksum`) is none if that is another one, and if it is missing
    where it is needed.
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
    """A JSON-able object with the key "checksum"; see `parse_checked_object`."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return {**value, _CHECKSUM: hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file into a folder that exists; an old one is replaced."""
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
    """Writes JSON for people and programs, atomically.

    A name that is not UTF-8, which Python holds with lone surrogates, comes back as it was.
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
    """A file that has its name once the block has ended well; its local folder must exist.

    An old one is replaced then.

    Yields:
        Where the block writes a file: a temporary name in the same folder, or in the system's
        temporary folder for a URL, from where it is uploaded.

    Raises:
        FullError: there is no room for it.
        StorageError: the disk or the store does not take it.
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
                os.fsync(file.fileno())  # all of it is on the disk before it has its name
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A hidden name in the same folder, which no other process takes and no search finds."""
    path = pathlib.Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")


def remove_temporary_files(folder: str, wanted: Callable[[str], bool]) -> None:
    """Removes the half-written files that killed processes have left; in a store there are none.

    Those whose names were to be `wanted`; no other process may be writing them now.
    """
    if is_remote(folder):
        return
    for name in list_names(folder, wanted=_TEMPORARY.fullmatch):
        found = _TEMPORARY.fullmatch(name)
        if found and wanted(found[1]):
            remove(join(folder, name))


def upload(path: str | os.PathLike[str], url: str) -> None:
    """Copies a local file into a store, where it appears whole; an old one is replaced."""
    _call(url, lambda system, name: system.put_file(os.fspath(path), name), "written")


def list_names(
    folder: str, ending: str | tuple[str, ...] = "", wanted: Callable[[str], object] = bool
) -> list[str]:
    """Names of the files in a folder, sorted, hidden ones too; none where it is missing.

    Only those with an ending that are `wanted`: of a large folder the others take no memory.
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
    """Bytes of the files in a store's folder by name, as its listing says; see `list_names`."""
    return {name: int(info["size"] or 0) for name, info in _list_remote(folder) if wanted(name)}


def find_inputs(pattern: str) -> dict[str, int | None]:
    """The files of a store that the URL of a file, a folder or a glob stands for; one listing.

    `input_version` then knows them without a request.

    Returns:
        Bytes by URL, None where the store does not state them; empty where there is nothing.
    """
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
    found = {}
    for info in infos:
        if info["type"] != "directory":
            url = system.unstrip_protocol(info["name"])
            note_input(url, info)
            found[url] = info.get("size")
    return found


def remove(path: str) -> None:
    """Removes a file, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        if is_remote(path):
            _call(path, lambda system, name: system.rm_file(name), "removed")
        else:
            retry(functools.partial(os.unlink, path), path, "removed")


def make_folder(folder: str) -> None:
    """Makes a folder, and those above it, where it is missing."""
    if not is_remote(folder):
        os.makedirs(folder, exist_ok=True)
    elif folder.split("://", 1)[0] in _HAVE_FOLDERS:
        _call(folder, lambda system, name: system.makedirs(name, exist_ok=True), "made")


def refuse_url(path: str | os.PathLike[str] | None, name: str) -> None:
    """Raises ValueError for an output in an object store; `name` is that of its flag."""
    if path is not None and is_remote(os.fspath(path)):
        raise ValueError(
            f"{name}={os.fspath(path)}: this is written to local or mounted folders only; write it "
            "to one, and copy it to the store"
        )


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


def _call(url: str, function: Callable[[Any, str], _Result], participle: str = "read") -> _Result:
    """Calls a function with the store of a URL and the path there, and again after a failure."""
    system, name = open_system(url, use_listings_cache=False)
    result = retry(functools.partial(function, system, name), url, participle)
    if participle != "read":
        open_system(url)[0].invalidate_cache(name)  # of a listing that inputs are looked up in
        forget_input(url)
    return result
