"""Opened files, local or in a store (`gs://`, `s3://`, anything fsspec knows), by few requests.

A read that the operating system or a store refuses is tried again after a while (`retry`). If it
goes on failing, the result is a `StorageError`, which names the file: the data may be good, so the
file must be taken neither for missing nor for damaged. A file that does not exist is a
FileNotFoundError at once.

`open_file` opens a file for reading from front to back: one in a store is fetched by large blocks,
each once, and the next one while a block is being read. `RangesFile` is for parts of a file in any
order. Local files are read without fsspec.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import stat
import time
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# Waited before each further attempt; long enough for a file server that is started again.
DELAYS_SECS = (0.1, 0.5, 2.0, 5.0)
# A name under which no file can exist.
_MISSING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENXIO}
)
# Nothing more can be written: the disk or the quota is full, or the file may not become larger.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Refused for good: waiting changes nothing.
_FINAL = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, *_FULL})
# Answers of a server that has too much to do, or is failing; a 4xx else is about the request.
_PASSING_STATUS = frozenset({408, 425, 429, *range(500, 600)})
# Errors of connections that have no number, by package and name, since no package is imported here.
_PASSING_TYPES = frozenset(
    {
        *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError"),
        *("botocore.HTTPClientError", "botocore.ConnectionError", "botocore.ResponseParserError"),
        *("botocore.IncompleteReadError", "asyncio.IncompleteReadError", "urllib.URLError"),
        # An answer that was damaged on its way, as the client's checksum tells.
        *("botocore.FlexibleChecksumError", "botocore.ChecksumError", "gcsfs.ChecksumError"),
        *("google.DataCorruption", "azure.IncompleteReadError"),
        *("azure.ServiceRequestError", "azure.ServiceResponseError"),
        *("requests.ConnectionError", "requests.Timeout", "requests.ChunkedEncodingError"),
        *("urllib3.TimeoutError", "urllib3.ProtocolError", "urllib3.MaxRetryError"),
        *("httpx.TransportError", "httpx2.TransportError"),  # the second is huggingface_hub's
        *("http.IncompleteRead", "http.BadStatusLine"),
        *("google.RetryError", "google.TransportError"),
    }
)

BLOCK_BYTES = 2**24  # of one request
_BUFFER_BYTES = 2**16
_MAX_BLOCKS = 3  # of one file, in memory
# What object stores call the version of a file, the most telling name first.
_VERSIONS = ("etag", "ETag", "generation", "mtime", "LastModified", "updated", "created", "blob_id")
# URL -> bytes and version of the input files that `note_input` was told of.
_inputs: dict[str, tuple[int | None, str | None]] = {}

sleep = time.sleep  # tests put their own clock here


class StorageError(OSError, ValueError):
    """A file that exists could not be read, after several attempts; names it."""


class FullError(StorageError):
    """No room for an output: a full disk, a quota, or a limit on the size of files; names it."""


def is_missing(error: OSError) -> bool:
    """Returns whether an error means that there is no such file."""
    return error.errno in _MISSING or isinstance(
        error, FileNotFoundError | NotADirectoryError | IsADirectoryError
    )


def is_storage_failure(error: BaseException) -> bool:
    """Returns whether storage has failed, so that the contents may be good.

    Errors of stores often have no number: timeouts, lost connections and answers of a server such
    as 503 are recognised by their type or status. Any other error without a number comes from a
    library that does not like the contents.
    """
    if isinstance(error, OSError) and is_missing(error):
        return False
    if isinstance(error, StorageError | TimeoutError | ConnectionError | PermissionError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return True
    if _http_status(error) in _PASSING_STATUS:
        return True
    types = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return not types.isdisjoint(_PASSING_TYPES) and _http_status(error) is None


def is_outage(error: BaseException) -> bool:
    """Whether a storage has failed in a way that passes by itself: nothing was refused for good."""
    return is_storage_failure(error) and not _is_final(error.__cause__ or error)


def _http_status(error: BaseException) -> int | None:
    """The status of a server's answer, as aiohttp, botocore, gcsfs, azure and requests have it."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:
        found = [
            getattr(owner, name, None)
            for owner in (error, response)
            for name in ("status", "status_code", "code")
        ]
    return next((status for status in found if isinstance(status, int)), None)


def retry(
    read: Callable[[], _Result], path: str | os.PathLike[str], participle: str = "read"
) -> _Result:
    """Calls a function until the operating system, or a store, lets it succeed.

    Args:
        read: reads something, or writes a whole file; is called again after a failure.
        path: of the file, for the message.
        participle: what is done to the file, for the message.

    Raises:
        StorageError: the last attempt failed, too.
        OSError: there is no such file (`is_missing`); at once.
    """
    for delay_secs in (*DELAYS_SECS, None):
        try:
            return read()
        except Exception as error:
            if isinstance(error, StorageError) or not is_storage_failure(error):
                raise
            if delay_secs is None or _is_final(error):
                attempts = "" if _is_final(error) else f" in {len(DELAYS_SECS) + 1} attempts"
                hint = "its contents may be good: " if participle == "read" else ""
                # A timeout has no text of its own.
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise StorageError(
                    f"{os.fspath(path)}: could not be {participle}{attempts} ({reason}); {hint}"
                    "look at the disk, the network and the permissions, and run the command again"
                ) from error
        sleep(delay_secs)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def naming_output(path: str | os.PathLike[str]) -> Generator[None]:
    """Names the output in errors of writing it, which the operating system leaves without a name.

    They become a FullError where there is no room for it, else a StorageError.
    """
    try:
        yield
    except OSError as error:
        is_full = error.errno in _FULL
        if error.errno is None or (error.filename is not None and not is_full):
            raise
        advice = "look at the disk and the network"
        if is_full:
            advice = "free some space, raise the limit, or choose another place"
        raise (FullError if is_full else StorageError)(
            f"{os.fspath(path)}: could not be written ({os.strerror(error.errno)}); {advice}, and "
            "run the command again"
        ) from error


def _is_final(error: BaseException) -> bool:
    return isinstance(error, PermissionError) or getattr(error, "errno", None) in _FINAL


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as `gs://bucket/train-00000.tfrecord`."""
    return "://" in path


def open_system(url: str, *, use_listings_cache: bool = True) -> tuple[Any, str]:
    """The fsspec file system that a URL belongs to, and its path there.

    Without `use_listings_cache` no earlier listing is believed: for folders that other processes
    write to.

    Raises:
        ValueError: nothing installed knows such URLs.
    """
    system = _file_system(url.split("://", 1)[0], use_listings_cache)
    return system, system._strip_protocol(url)


def listed_url(url: str) -> str:
    """A URL in the form of listings: gs:// for gcs://, and no slash at its end."""
    system, path = open_system(url)
    return system.unstrip_protocol(path)


@functools.cache
def _file_system(protocol: str, use_listings_cache: bool) -> Any:
    # Not at the top: whoever trains on local files needs none of it.
    import fsspec

    # Without the option it is the one file system that everybody else in this process uses.
    options = {} if use_listings_cache else {"use_listings_cache": False}
    try:
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{protocol}:// cannot be read: {error}. gs:// needs `pip install gcsfs`, s3:// needs "
            "`pip install s3fs`"
        ) from error


def note_input(url: str, info: dict[str, Any]) -> None:
    """Keeps what a listing states of an input file, for `input_version`."""
    size = info.get("size")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), None)
    _inputs[url] = None if size is None else int(size), version


def forget_input(url: str) -> None:
    """Makes `input_version` ask for a file that this process has written."""
    _inputs.pop(url, None)


def input_version(url: str) -> tuple[int, str | None]:
    """Bytes of an input file in a store, and its version; None where the store states none.

    A listing of its folder that this process has made is believed.
    """
    size, version = _inputs.get(url, (None, None))
    if size is None:
        system, name = open_system(url)
        note_input(url, retry(functools.partial(system.info, name), url))
        size, version = _inputs.pop(url)
    if size is None:
        raise ValueError(f"{url}: the store states no size")
    return size, version


def input_size(path: str) -> int:
    """Bytes of an input file, local or in a store; see `input_version`."""
    return input_version(path)[0] if is_remote(path) else os.path.getsize(path)


def read_range(url: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file in a store, fewer at its end; one request."""
    system, path = open_system(url)
    read = functools.partial(system.cat_file, path, start=start, end=max(start, end))
    return retry(read, url)


def read_start(url: str, num_bytes: int) -> bytes:
    """The first bytes of a file in a store, also of an empty one, where stores refuse a range."""
    system, path = open_system(url)

    def read() -> bytes:
        try:
            return system.cat_file(path, start=0, end=num_bytes)
        except OSError as error:
            if error.errno == errno.EINVAL and system.info(path)["size"] == 0:
                return b""
            raise

    return retry(read, url)


def read_whole(url: str) -> bytes:
    """A file in a store; of up to 16 MiB by one request.

    Without a range, some file systems ask for the size first.
    """
    data = read_start(url, BLOCK_BYTES)
    if len(data) < BLOCK_BYTES:
        return data
    system, path = open_system(url, use_listings_cache=False)
    size = int(retry(functools.partial(system.info, path), url)["size"])
    return data + read_range(url, len(data), size) if size > len(data) else data


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a file, local or in a store, whose reads are tried again.

    Each can raise StorageError, which `check_failure` finds where a library has wrapped it.
    """
    return io.BufferedReader(RangesFile(os.fspath(path), in_blocks=True), _BUFFER_BYTES)


def open_local(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens an ordinary local file for reading, without a buffer; see `check_ordinary`."""
    check_ordinary(path)
    return open(path, "rb", buffering=0)


def check_ordinary(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a pipe, a socket or a device, which could be waited for without end."""
    if is_remote(os.fspath(path)):
        return
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(
            f"{os.fspath(path)}: a pipe, a socket or a device; expected an ordinary file"
        )


def check_readable(path: str | os.PathLike[str]) -> None:
    """Raises the StorageError of a file that cannot be read to its end; see `retry`.

    For libraries that read by themselves, and name the same error for a bad disk and a bad file.
    """
    with open_file(path) as file:
        while file.read(2**22):
            pass


def check_failure(file: io.BufferedReader | RangesFile) -> None:
    """Raises the StorageError of a file from `open_file`, which a library may have wrapped."""
    failure = getattr(getattr(file, "raw", file), "failure", None)
    if failure is not None:
        raise failure


class RangesFile(io.RawIOBase):
    """An open file, local or in a store, for reads of parts in any order, and as a file object.

    A local file is opened again where a read fails. In a store every read is one ranged request;
    with `in_blocks` large blocks are fetched, each once, and the next one in the background.

    Attributes:
        path: of the file, or its URL.
        size: in bytes.
        failure: the StorageError that a read as a file object has raised, else None.
    """

    def __init__(self, path: str, size: int | None = None, *, in_blocks: bool = False):
        """Opens it; `size` is that of a file in a store, if it is known."""
        self.path, self.failure = path, None
        self._position, self._file, self._blocks = 0, None, None
        if not is_remote(path):
            self._file = retry(functools.partial(open_local, path), path)
            self.size = os.fstat(self._file.fileno()).st_size
            return
        self.size = input_size(path) if size is None else size
        if in_blocks:
            from fsspec.caching import BackgroundBlockCache

            self._blocks = BackgroundBlockCache(BLOCK_BYTES, self._fetch, self.size, _MAX_BLOCKS)

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes [start, end), fewer at the end of the file."""
        if self._blocks is not None:
            return self._blocks._fetch(start, end)
        if is_remote(self.path):
            return read_range(self.path, start, end)
        return retry(functools.partial(self._read_local, start, end), self.path)

    def _read_local(self, start: int, end: int) -> bytes:
        file = self._file  # held here, so that another thread that opens it again does not close it
        assert file is not None
        try:
            return os.pread(file.fileno(), max(0, end - start), start)
        except OSError:
            # The descriptor of a file server that was started again stays stale.
            self._file = open_local(self.path)
            raise

    def _fetch(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        data = read_range(self.path, start, end) if start < end else b""
        if len(data) != max(0, end - start):
            raise StorageError(
                f"{self.path}: it was written again while it was being read; run the command again"
            )
        return data

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position; nothing is read."""
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        position = starts[whence] + offset
        if position < 0:
            raise ValueError(f"{self.path}: negative position {position}")
        self._position = position
        return position

    def readinto(self, buffer: memoryview) -> int:
        """Reads into a buffer, and keeps the failure of a read."""
        end = max(self._position, min(self._position + len(buffer), self.size))
        try:
            data = self.read_range(self._position, end) if end > self._position else b""
        except StorageError as error:
            self.failure = error
            raise
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        """Closes the file."""
        if not self.closed:
            for opened in filter(None, (self._file, self._blocks)):
                opened.close()
        super().close()
