"""Files in object stores (`gs://`, `s3://`, `memory://`, anything fsspec knows), by few requests.

`open_file` opens a file for reading from front to back, wherever it lies: one in a store is fetched
by large blocks, each once, and the next one while a block is being read. Local files are read
without fsspec.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import io
import os
import pathlib
import tempfile
from collections.abc import Iterator
from concurrent import futures
from typing import Any

from diht_jax.storage import retries
from diht_jax.storage.atomic_file import write_atomically
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
    """As `read_range` from the first byte on; the file may be empty.

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
            `retries.check_failure` finds it where a library has wrapped it.
    """
    name = os.fspath(path)
    return (
        io.BufferedReader(StoreFile(name), _BUFFER_BYTES)
        if is_remote(name)
        else (retries.open_file(name))
    )


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """The path of a local file; of one in a store, that of a copy, which is deleted in the end."""
    if not is_remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="diht_jax-") as folder:
        copy = os.path.join(folder, path.rsplit("/", 1)[1])
        with StoreFile(path) as source, open(copy, "xb") as target:
            while data := source.read(BLOCK_BYTES):
                target.write(data)
        yield copy


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file, local or in a store; an old one is replaced.

    Args:
        path: of the file; a local folder must exist.
        data: its contents.

    Raises:
        StorageError: the store does not take it, now and after some attempts.
    """
    if not is_remote(path):
        write_atomically(pathlib.Path(path), data)
        return
    system, name = open_system(path, use_listings_cache=False)
    retry(lambda: system.pipe_file(name, data), path, "written")


def upload(path: str | os.PathLike[str], url: str) -> None:
    """Copies a local file into a store, where it appears whole; an old one is replaced.

    Raises:
        StorageError: the store does not take it, now and after some attempts.
    """
    system, name = open_system(url, use_listings_cache=False)
    retry(lambda: system.put_file(os.fspath(path), name), url, "written")


def remove(url: str) -> None:
    """Removes a file of a store, if it is there.

    Raises:
        StorageError: the store does not do it, now and after some attempts.
    """
    system, name = open_system(url, use_listings_cache=False)
    with contextlib.suppress(FileNotFoundError):
        retry(lambda: system.rm_file(name), url, "removed")


def check_writable(folder: str, name: str) -> None:
    """Writes a small file into a folder of a store and removes it.

    Args:
        folder: URL of an output.
        name: of the flag, for the message, such as "--output".

    Raises:
        ValueError: the store takes no file: no such bucket, no permission, no writing.
    """
    probe = f"{folder.rstrip('/')}/.probe"
    try:
        write_bytes(probe, b"")
        remove(probe)
    except ValueError:
        raise
    except Exception as error:  # a missing bucket, a store that is read only, no credentials
        raise ValueError(
            f"{name}='{folder}': nothing can be written there "
            f"({str(error) or type(error).__name__}); expected a local folder, or one in a bucket "
            "that exists and may be written to"
        ) from error


class StoreFile(retries.PositionedFile):
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

    def readinto(self, buffer: memoryview) -> int:
        if self._position >= self.size or not len(buffer):
            return 0
        number = bisect.bisect_right(self._borders, self._position) - 1
        start = self._borders[number]
        if start not in self._blocks:
            try:
                self._load(number)
            except StorageError as error:
                self.failure = error
                raise
        part = memoryview(self._blocks[start])[self._position - start :][: len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
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
        """Whether a block will be read after the one before it."""
        return number + 1 < len(self._borders)

    def _forget(self, position: int) -> None:
        """Drops what is not needed any more, where the block at a position is read."""
        self._blocks.clear()
        if self._ahead is not None and self._ahead[0] < position:
            self._ahead = None


class StoreEnd(StoreFile):
    """A file in a store whose last bytes are wanted, such as the directory of a zip archive.

    They are one request, and what lies before them another one where it is read at all.
    """

    def __init__(self, url: str, num_bytes: int):
        """Of a URL, and how many bytes at its end; errors as of `StoreFile`."""
        super().__init__(url)
        self._borders = sorted({0, max(0, self.size - num_bytes), self.size})

    def _is_wanted(self, number: int) -> bool:
        return False

    def _forget(self, position: int) -> None:
        """Keeps both."""
