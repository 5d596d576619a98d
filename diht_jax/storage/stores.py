"""Opened files, local or in a store (`gs://`, `s3://`, anything fsspec supports), with retries.

A failed read is retried after some delays (`retry`). If it keeps failing, it raises a
`StorageError` that names the file. The data may be intact, so the file must not be treated as
missing or damaged. A file that does not exist raises FileNotFoundError at once.

`open_file` opens a file for sequential reading. From a store, it fetches large blocks, each once,
and prefetches the next block in the background. `RangesFile` reads parts of a file in any order.
Local files are read without fsspec.
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
from concurrent import futures
from typing import Any, TypeVar

_Result = TypeVar("_Result")

# Delays before the retries; long enough for a file server to restart.
DELAYS_SECS = (0.1, 0.5, 2.0, 5.0)
# Errors of a path at which there is no file.
_MISSING = frozenset(
    {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR, errno.ENXIO}
)
# No space: the disk or the quota is full, or the file has reached its size limit.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Permanent errors, which are not retried.
_FINAL = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, *_FULL})
# HTTP statuses of an overloaded or failing server; other 4xx are errors of the request.
_PASSING_STATUS = frozenset({408, 425, 429, *range(500, 600)})
# Connection errors without an errno, by package and name, to avoid importing the packages.
_PASSING_TYPES = frozenset(
    {
        *("aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError"),
        *("botocore.HTTPClientError", "botocore.ConnectionError", "botocore.ResponseParserError"),
        *("botocore.IncompleteReadError", "asyncio.IncompleteReadError", "urllib.URLError"),
        # A response damaged in transit, according to the client's checksum.
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

BLOCK_BYTES = 2**24  # per request
_BUFFER_BYTES = 2**16
_MAX_BLOCKS = 3  # in memory, per file
# Names of a file's version in listings of object stores, the most specific first.
_VERSIONS = ("etag", "ETag", "generation", "mtime", "LastModified", "updated", "created", "blob_id")
# URL -> bytes and version of the input files recorded by `note_input`.
_inputs: dict[str, tuple[int | None, str | None]] = {}

sleep = time.sleep  # replaced in tests


class StorageError(OSError, ValueError):
    """An existing file could not be read, or an output could not be written; names the file."""


class FullError(StorageError):
    """No space for an output: a full disk, a quota, or a limit on file sizes; names the file."""


def is_missing(error: OSError) -> bool:
    """Returns whether an error means that the file does not exist."""
    return error.errno in _MISSING or isinstance(
        error, FileNotFoundError | NotADirectoryError | IsADirectoryError
    )


def is_storage_failure(error: BaseException) -> bool:
    """Returns whether an error comes from the storage, in which case the contents may be intact.

    Errors of stores often have no errno. Timeouts, lost connections and server errors such as 503
    are recognised by type or status. Any other error without an errno comes from a library that
    rejects the contents.
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
    """Returns whether an error is a transient storage failure, rather than a permanent refusal."""
    return is_storage_failure(error) and not _is_final(error.__cause__ or error)


def _http_status(error: BaseException) -> int | None:
    """Returns the HTTP status in an error of aiohttp, botocore, gcsfs, azure or requests."""
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
    """Calls a function, and calls it again after transient failures of the disk or the store.

    Args:
        read: reads something or writes a whole file; must be repeatable.
        path: path of the file, for the message.
        participle: what is done to the file, for the message.

    Raises:
        StorageError: the last attempt failed, or the error is permanent.
        OSError: the file does not exist (`is_missing`); raised at once.
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
                # A timeout has no message.
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                raise StorageError(
                    f"{os.fspath(path)}: could not be {participle}{attempts} ({reason}); {hint}"
                    "look at the disk, the network and the permissions, and run the command again"
                ) from error
        sleep(delay_secs)
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def naming_output(path: str | os.PathLike[str]) -> Generator[None]:
    """Context manager that names the output in errors of writing, which lack a file name.

    A full disk becomes a FullError, other errors become a StorageError.
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
    """Returns whether a path is a URL such as `gs://bucket/train-00000.tfrecord`."""
    return "://" in path


def open_system(url: str, *, use_listings_cache: bool = True) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it.

    `use_listings_cache=False` ignores earlier listings. It is for folders that other processes
    write to.

    Raises:
        ValueError: no installed package supports the protocol.
    """
    system = _file_system(url.split("://", 1)[0], use_listings_cache)
    return system, system._strip_protocol(url)


def listed_url(url: str) -> str:
    """Returns a URL in the form of listings: gs:// for gcs://, and without a trailing slash."""
    system, path = open_system(url)
    return system.unstrip_protocol(path)


@functools.cache
def _file_system(protocol: str, use_listings_cache: bool) -> Any:
    # Imported here, since training on local files does not need it.
    import fsspec

    # Without the option, fsspec returns the instance that the whole process shares.
    options = {} if use_listings_cache else {"use_listings_cache": False}
    try:
        return fsspec.filesystem(protocol, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{protocol}:// cannot be read: {error}. gs:// needs `pip install gcsfs`, s3:// needs "
            "`pip install s3fs`"
        ) from error


def note_input(url: str, info: dict[str, Any]) -> None:
    """Records the size and version of an input file from a listing, for `input_version`."""
    size = info.get("size")
    version = next((str(info[key]) for key in _VERSIONS if info.get(key)), None)
    _inputs[url] = None if size is None else int(size), version


def forget_input(url: str) -> None:
    """Drops the record of a file that this process has written, for `input_version`."""
    _inputs.pop(url, None)


def input_version(url: str) -> tuple[int, str | None]:
    """Returns the bytes of an input file in a store, and its version (None if there is none).

    Uses the listing of its folder if this process has made one.
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
    """Returns the bytes of an input file, local or in a store; see `input_version`."""
    return input_version(path)[0] if is_remote(path) else os.path.getsize(path)


def read_range(url: str, start: int, end: int) -> bytes:
    """Reads the bytes [start, end) of a file in a store with one request; fewer at its end."""
    system, path = open_system(url)
    read = functools.partial(system.cat_file, path, start=start, end=max(start, end))
    return retry(read, url)


def read_start(url: str, num_bytes: int) -> bytes:
    """Reads the first bytes of a file in a store; handles empty files, where ranges fail."""
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
    """Reads a whole file in a store; a file below 16 MiB takes one request.

    It asks for a range, since some file systems otherwise look up the size first.
    """
    data = read_start(url, BLOCK_BYTES)
    if len(data) < BLOCK_BYTES:
        return data
    system, path = open_system(url, use_listings_cache=False)
    size = int(retry(functools.partial(system.info, path), url)["size"])
    return data + read_range(url, len(data), size) if size > len(data) else data


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a file, local or in a store, for buffered reading with retries.

    A read can raise StorageError; `check_failure` finds it if a library has wrapped it.
    """
    return io.BufferedReader(RangesFile(os.fspath(path), in_blocks=True), _BUFFER_BYTES)


def open_local(path: str | os.PathLike[str]) -> io.FileIO:
    """Opens an ordinary local file for reading without a buffer; see `check_ordinary`."""
    check_ordinary(path)
    return open(path, "rb", buffering=0)


def check_ordinary(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a pipe, a socket or a device, since reading it could block forever."""
    if is_remote(os.fspath(path)):
        return
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError(
            f"{os.fspath(path)}: a pipe, a socket or a device; expected an ordinary file"
        )


def check_readable(path: str | os.PathLike[str]) -> None:
    """Reads a file to its end to raise the StorageError of a file that cannot be read; see `retry`.

    For libraries that do their own reads and raise the same error for a bad disk and a bad file.
    """
    with open_file(path) as file:
        while file.read(2**22):
            pass


def check_failure(file: io.BufferedReader | RangesFile) -> None:
    """Raises the StorageError of a file from `open_file`, if any; a library may have wrapped it."""
    failure = getattr(getattr(file, "raw", file), "failure", None)
    if failure is not None:
        raise failure


class RangesFile(io.RawIOBase):
    """A file, local or in a store, for reading parts in any order and as a file object.

    A local file is reopened after a failed read. In a store, every read is one ranged request. With
    `in_blocks`, large blocks are fetched, each once, and the next one in the background.

    Attributes:
        path: path or URL of the file.
        size: size in bytes.
        failure: the StorageError of a failed read as a file object, else None.
    """

    def __init__(self, path: str, size: int | None = None, *, in_blocks: bool = False):
        """Opens the file; `size` is the size of a file in a store, if known."""
        self.path, self.failure = path, None
        self._position, self._file, self._pool = 0, None, None
        if not is_remote(path):
            self._file = retry(functools.partial(open_local, path), path)
            self.size = os.fstat(self._file.fileno()).st_size
            return
        self.size = input_size(path) if size is None else size
        if in_blocks:
            self._pool = futures.ThreadPoolExecutor(2)
            submit = functools.partial(self._pool.submit, _fetch_block, path, self.size)
            self._block = functools.lru_cache(_MAX_BLOCKS)(submit)

    def read_range(self, start: int, end: int) -> bytes:
        """Returns the bytes [start, end), fewer at the end of the file."""
        if self._pool is not None:
            return self._read_blocks(start, end)
        if is_remote(self.path):
            return read_range(self.path, start, end)
        return retry(functools.partial(self._read_local, start, end), self.path)

    def _read_local(self, start: int, end: int) -> bytes:
        file = self._file  # a reference, since another thread may reopen the file
        assert file is not None
        try:
            return os.pread(file.fileno(), max(0, end - start), start)
        except OSError:
            # After a restart of the file server, the old descriptor stays stale.
            self._file = open_local(self.path)
            raise

    def _read_blocks(self, start: int, end: int) -> bytes:
        parts = []
        for number in range(start // BLOCK_BYTES, -(-min(end, self.size) // BLOCK_BYTES)):
            try:
                block = self._block(number).result()
            except Exception:
                self._block.cache_clear()
                raise
            if (number + 1) * BLOCK_BYTES < self.size:
                self._block(number + 1)
            first = number * BLOCK_BYTES
            parts.append(block[max(0, start - first) : end - first])
        return b"".join(parts)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def seekable(self) -> bool:
        """Returns True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position without reading."""
        starts = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}
        position = starts[whence] + offset
        if position < 0:
            raise ValueError(f"{self.path}: negative position {position}")
        self._position = position
        return position

    def readinto(self, buffer: memoryview) -> int:
        """Reads into a buffer; a StorageError is also kept as `failure`."""
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
        if self._file is not None:
            self._file.close()
        if self._pool is not None:
            # The garbage collector may close the file while a thread starts, and then a wait for
            # another thread would never end.
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._block.cache_clear()
        super().close()


def _fetch_block(url: str, size: int, number: int) -> bytes:
    start, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, size)
    data = read_range(url, start, end)
    if len(data) != end - start:
        raise StorageError(
            f"{url}: it was written again while it was being read; run the command again"
        )
    return data
