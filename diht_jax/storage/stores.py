"""Opened files, local or in a store (`gs://`, `s3://`, anything fsspec knows), by few requests.

`open_file` opens a file, local or in a store, for reading from front to back: one in a store is
fetched by large blocks, each once, and the next one while a block is being read. Local files are
read without fsspec.
"""

from __future__ import annotations

import bisect
import errno
import functools
import io
import os
from concurrent import futures
from typing import Any

from diht_jax.storage.retries import StorageError, retry

BLOCK_BYTES = 2**24  # of one request
_BUFFER_BYTES = 2**16


def is_remote(path: str) -> bool:
    """Whether a path is a URL such as `gs://bucket/train-00000.tfrecord`."""
    return "://" in path


def open_system(url: str, *, use_listings_cache: bool = True) -> tuple[Any, str]:
    """The fsspec file system that a URL belongs to, and its path there.

    Args:
        url: of a file or folder.
        use_listings_cache: whether what an earlier listing has shown is believed; False for
            folders that other processes write to.

    Raises:
        ValueError: nothing installed knows such URLs.
    """
    system = _file_system(url.split("://", 1)[0], use_listings_cache)
    return system, system._strip_protocol(url)


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


def read_range(url: str, start: int, end: int) -> bytes:
    """The bytes [start, end) of a file in a store, fewer at its end; one request.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read, now and after some attempts.
    """
    system, path = open_system(url)
    return retry(lambda: system.cat_file(path, start=start, end=max(start, end)), url)


def read_start(url: str, num_bytes: int) -> bytes:
    """The first bytes of a file in a store, which may be empty.

    Stores refuse a range of an empty file.
    """
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

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read, now and after some attempts.
    """
    data = read_start(url, BLOCK_BYTES)
    if len(data) < BLOCK_BYTES:
        return data
    system, path = open_system(url, use_listings_cache=False)
    size = int(retry(lambda: system.info(path), url)["size"])
    return data if size <= len(data) else data + read_range(url, len(data), size)


def open_file(path: str | os.PathLike[str]) -> io.BufferedReader:
    """Opens a file, local or in a store; its reads are tried again.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read, now and after some attempts; every read can raise it, and
            `check_failure` finds it where a library has wrapped it.
    """
    name = os.fspath(path)
    return io.BufferedReader((StoreFile if is_remote(name) else LocalFile)(name), _BUFFER_BYTES)


def open_ranges(path: str, num_bytes: int | None = None) -> LocalRanges | StoreRanges:
    """Opens a file of which parts are read, in any order and by several threads.

    Args:
        path: of the file, or its URL.
        num_bytes: size of a file in a store; None costs a request.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read, now and after some attempts; also of every read.
    """
    if is_remote(path):
        system, name = open_system(path)
        size = int(retry(lambda: system.size(name), path)) if num_bytes is None else num_bytes
        return StoreRanges(path, size)
    return LocalRanges(path)


def check_readable(path: str | os.PathLike[str]) -> None:
    """Raises the StorageError of a file that cannot be read to its end; see `retry`.

    For libraries that read by themselves, and name the same error for a bad disk and a bad file.
    """
    with open_file(path) as file:
        while file.read(2**22):
            pass


def check_failure(file: io.BufferedReader) -> None:
    """Raises the StorageError of a file from `open_file`, which a library may have wrapped."""
    if file.raw.failure is not None:
        raise file.raw.failure


class PositionedFile(io.RawIOBase):
    """Base of `LocalFile` and `StoreFile`: a position, and the failure of a read.

    Attributes:
        name: path or URL.
        size: in bytes; set by the class that derives from it.
        failure: the StorageError that a read has raised, else None.
    """

    size: int

    def __init__(self, name: str):
        self.name = name
        self.failure: StorageError | None = None
        self._position = 0

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """The position of the next read."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves the position; nothing is read."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise ValueError(f"{self.name}: negative position {start + offset}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Reads into a buffer, and keeps the failure of a read."""
        try:
            count = self._fill(buffer)
        except StorageError as error:
            self.failure = error
            raise
        self._position += count
        return count

    def _fill(self, buffer: memoryview) -> int:
        """Reads bytes at the position into a buffer; returns their number."""
        raise NotImplementedError


class LocalFile(PositionedFile):
    """A file that is opened again, at the same position, where a read fails."""

    def __init__(self, path: str):
        super().__init__(path)
        self._file: io.FileIO | None = None
        self.size = retry(self._measure, path)

    def close(self) -> None:
        """Closes the file."""
        self._drop()
        super().close()

    def _fill(self, buffer: memoryview) -> int:
        return retry(lambda: self._read(buffer), self.name)

    def _measure(self) -> int:
        return os.fstat(self._opened().fileno()).st_size

    def _read(self, buffer: memoryview) -> int:
        try:
            file = self._opened()
            file.seek(self._position)
            return file.readinto(buffer)
        except OSError:
            # The descriptor of a file server that was started again stays stale.
            self._drop()
            raise

    def _opened(self) -> io.FileIO:
        if self._file is None:
            self._file = open(self.name, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        return self._file

    def _drop(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


class StoreFile(PositionedFile):
    """A file in a store; every block of it is one request where it is read from front to back."""

    def __init__(self, url: str):
        """Asks for the size, and reads nothing yet.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read, now and after some attempts.
        """
        super().__init__(url)
        system, path = open_system(url)
        self.size = int(retry(lambda: system.info(path), url)["size"])
        self._blocks: dict[int, bytes] = {}  # by their first byte
        self._borders: list[int] = [*range(0, self.size, BLOCK_BYTES), self.size]
        self._pool: futures.ThreadPoolExecutor | None = None
        self._ahead: tuple[int, futures.Future[bytes]] | None = None  # and its first byte

    def _fill(self, buffer: memoryview) -> int:
        if self._position >= self.size or not len(buffer):
            return 0
        number = bisect.bisect_right(self._borders, self._position) - 1
        start = self._borders[number]
        if start not in self._blocks:
            self._load(number)
        part = memoryview(self._blocks[start])[self._position - start :][: len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Gives up what is being fetched."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None
        self._blocks = {}
        super().close()

    def _load(self, number: int) -> None:
        """Fetches a block, and begins to fetch the one behind it."""
        start, end = self._borders[number : number + 2]
        if self._ahead is not None and self._ahead[0] == start:
            data, self._ahead = self._ahead[1].result(), None
        else:
            data = self._fetch(start, end)
        self._forget(start)
        self._blocks[start] = data
        if self._ahead is None and self._is_wanted(number + 1):
            if self._pool is None:
                self._pool = futures.ThreadPoolExecutor(1)
            begin, end = self._borders[number + 1 : number + 3]
            self._ahead = begin, self._pool.submit(self._fetch, begin, end)

    def _fetch(self, start: int, end: int) -> bytes:
        data = read_range(self.name, start, end)
        if len(data) != end - start:
            raise StorageError(
                f"{self.name}: it was written again while it was being read; run the command again"
            )
        return data

    def _is_wanted(self, number: int) -> bool:
        """Returns whether a block will be read after the one before it."""
        return number + 1 < len(self._borders)

    def _forget(self, position: int) -> None:
        """Drops what is not needed any more, where the block at a position is read."""
        self._blocks.clear()
        if self._ahead is not None and self._ahead[0] < position:
            self._ahead = None


class StoreRanges:
    """A file in a store; every read is one ranged request."""

    def __init__(self, url: str, size: int):
        self._url = url
        self.size = size

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes [start, end)."""
        return read_range(self._url, start, end)


class LocalRanges:
    """An open local file whose reads are tried again; closed by the garbage collector."""

    def __init__(self, path: str):
        self._path = path
        self._file = retry(self._open, path)
        self.size = os.fstat(self._file.fileno()).st_size

    def read_range(self, start: int, end: int) -> bytes:
        """The bytes [start, end)."""
        return retry(lambda: self._read_once(start, end), self._path)

    def _read_once(self, start: int, end: int) -> bytes:
        file = self._file  # held here, so that another thread that opens it again does not close it
        try:
            return os.pread(file.fileno(), max(0, end - start), start)
        except OSError:
            # The descriptor of a file server that was started again stays stale.
            self._file = self._open()
            raise

    def _open(self) -> io.FileIO:
        return open(self._path, "rb", buffering=0)  # lives as long as the object
