"""Blocks of records that were fetched ahead: files in a folder, and a table of their states.

The reader process of a host writes the files, and its decoding workers read records from them. Both
map the same table, so that neither waits for the other's process: a worker sees whether a block is
there, planned, or left to be read directly.

A file has the places of the block's records, and the bytes of its extent as they came::

    uint64 [n + 1] where each record begins in the file, and the end of the last one | extent
"""

from __future__ import annotations

import os
import pathlib
import shutil
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from diht_jax.storage.files import temporary_path
from diht_jax.storage.locks import lock_file
from diht_jax.storage.retries import StorageError, retry

# States of a block. One that is not planned, or has no room, is read record by record.
UNPLANNED, PLANNED, READY, DIRECT = range(4)
# The numbers of the table's head, int64 each.
_NUMBERS = (
    "is_planned",  # 1: the first plan is in the table
    "is_stopped",  # 1: nobody reads any more
    "has_failed",  # 1: `failure` has the reason
    "is_full",  # 1: a block that is needed now does not fit
    "position",  # of the run; everything before it was used
    "bytes",  # of blocks that are here or on their way
    "peak_bytes",
    "blocks",  # fetched so far
    "fetched_bytes",  # in them
    "planned_blocks",  # by the first plan
    "planned_bytes",
    "requests",  # sent so far, also those that failed
    "failed_requests",
    "hedged_requests",
)
_HEAD_BYTES = 8 * 16
_PLACES = struct.Struct("<2Q")
_PREFIX = "diht_jax_blocks_"
# Attempts to delete a folder, each of which a file that is being written may spoil.
_REMOVALS = 100
# Slept by a worker between two looks at the table.
_FIRST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.001, 0.05

sleep = time.sleep  # tests put their own clock here


class ReadAheadStopped(RuntimeError):
    """The record will not come any more: the input was closed."""


class BlockCache:
    """The folder of one host's blocks, and their table; every process opens its own."""

    def __init__(self, folder: pathlib.Path):
        """Opens a folder that `create` has made.

        Raises:
            FileNotFoundError: there is none.
        """
        self.folder = folder
        table = np.memmap(folder / "table", np.uint8, "r+")
        self._numbers = table[:_HEAD_BYTES].view(np.int64)
        self.states = table[_HEAD_BYTES:]

    @classmethod
    def create(cls, folder: pathlib.Path, num_blocks: int) -> BlockCache:
        """Begins an empty cache for so many blocks in a folder of `claim_folder`."""
        # Written whole: a page that a full file system cannot give would end the process.
        (folder / "table").write_bytes(bytes(_HEAD_BYTES + num_blocks))
        return cls(folder)

    def __getitem__(self, name: str) -> int:
        """A number of the table's head."""
        return int(self._numbers[_NUMBERS.index(name)])

    def __setitem__(self, name: str, value: int) -> None:
        self._numbers[_NUMBERS.index(name)] = value

    def numbers(self) -> dict[str, int]:
        """The numbers of the table's head by name."""
        return {name: self[name] for name in _NUMBERS}

    def write(self, block: int, starts: np.ndarray, data: bytes) -> None:
        """Makes a block ready.

        Args:
            block: its number.
            starts: int64 [n + 1], where its records begin within `data`, and the end.
            data: the bytes of its extent.

        Raises:
            OSError: the file system is full, or damaged.
        """
        places = (np.asarray(starts, np.int64) + 8 * len(starts)).astype("<u8")
        path = self._path(block)
        temporary = temporary_path(path)
        try:
            with open(temporary, "xb", buffering=0) as file:
                for part in (memoryview(places.tobytes()), memoryview(data)):
                    while part:
                        part = part[file.write(part) :]
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self.states[block] = READY

    def read(self, block: int, number: int) -> bytes:
        """The bytes of one record of a block.

        Args:
            block: its number.
            number: of the record within the block.

        Raises:
            FileNotFoundError: it is not here any more.
            StorageError: the disk of the folder fails.
        """
        path = self._path(block)

        def read() -> bytes:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                start, end = _PLACES.unpack(os.pread(descriptor, _PLACES.size, 8 * number))
                return os.pread(descriptor, end - start, start)
            finally:
                os.close(descriptor)

        return retry(read, path)

    def release(self, block: int) -> None:
        """Deletes a block."""
        self.states[block] = UNPLANNED
        self._path(block).unlink(missing_ok=True)

    def set_problem(self, problem: str) -> None:
        """Notes why the last request failed."""
        (self.folder / "problem").write_text(problem)

    def problem(self) -> str:
        """Why the last request failed; empty if none did."""
        path = self.folder / "problem"
        return path.read_text() if path.exists() else ""

    def fail(self, problem: str) -> None:
        """Ends the waiting of all workers with a StorageError."""
        (self.folder / "failure").write_text(problem)
        self["has_failed"] = 1

    def failure(self) -> str | None:
        """Why the read-ahead has ended; None as long as it goes on."""
        return (self.folder / "failure").read_text() if self["has_failed"] else None

    def _path(self, block: int) -> pathlib.Path:
        return self.folder / f"block_{block}"


class CachedRecords(Sequence[bytes]):
    """The records of a source, from blocks that were fetched ahead where there are some.

    A record of a block that is planned is waited for. All others are read from the source, one by
    one: before the read-ahead starts, and replacements of bad records that lie beyond its plan.
    """

    def __init__(self, source: Any, block_starts: np.ndarray, folder: pathlib.Path):
        """Opens nothing yet.

        Args:
            source: the records, such as `TFRecordSource`.
            block_starts: int64 [B + 1], the first record of each block, and the end.
            folder: of the `BlockCache`.
        """
        self._source = source
        self._block_starts = block_starts
        self._folder = folder
        self._cache: BlockCache | None = None
        self._opening = threading.Lock()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        """As of the source.

        Raises:
            StorageError: the read-ahead gave up; every waiting record ends with it.
            ReadAheadStopped: the input was closed meanwhile.
        """
        if not 0 <= index < len(self):
            return self._source[index]
        block = int(np.searchsorted(self._block_starts, index, side="right")) - 1
        piece = self._fetched(block, int(index - self._block_starts[block]))
        return self._source[index] if piece is None else self._source.unpack(int(index), piece)

    def __getattr__(self, name: str) -> Any:
        # `locate`, `paths`, `decode` and all else that a source has.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __repr__(self) -> str:
        # Grain compares it when it restores an iterator.
        return repr(self._source)

    def __getstate__(self) -> dict[str, object]:
        return {n: v for n, v in self.__dict__.items() if n not in ("_cache", "_opening")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state, _cache=None, _opening=threading.Lock())

    def forget(self) -> None:
        """Opens the folder again at the next record: another cache lies there, or none."""
        self._cache = None

    def _fetched(self, block: int, number: int) -> bytes | None:
        """The bytes of a record, once its block is ready; None where nobody fetches it."""
        cache = self._opened()
        pause = _FIRST_PAUSE_SECS
        while cache is not None:
            state = cache.states[block]
            if state == READY:
                try:
                    return cache.read(block, number)
                except FileNotFoundError:
                    # Released, or somebody else has deleted it.
                    if cache.states[block] == READY:
                        return None
                    continue
            if state != PLANNED and cache["is_planned"]:
                return None
            if cache["is_stopped"]:
                raise ReadAheadStopped("the input was closed while a record was awaited")
            if (problem := cache.failure()) is not None:
                raise StorageError(problem)
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECS)
        return None

    def _opened(self) -> BlockCache | None:
        if self._cache is None:
            with self._opening:
                try:
                    self._cache = self._cache or BlockCache(self._folder)
                except FileNotFoundError:
                    return None
        return self._cache


def new_folder(parent: pathlib.Path) -> pathlib.Path:
    """The name of a folder that nobody else takes."""
    return parent / f"{_PREFIX}{os.urandom(8).hex()}"


def claim_folder(folder: pathlib.Path) -> BinaryIO:
    """Makes the folder of a cache, and deletes those beside it of runs that were killed.

    This process holds a lock on a file in it, which the kernel frees at its end; process ids would
    not do, since containers with ids of their own may share the disk.

    Args:
        folder: of `new_folder`.

    Returns:
        The file that holds its lock until it is closed.

    Raises:
        OSError: the folder above it cannot be written to.
    """
    for stale in folder.parent.glob(f"{_PREFIX}*"):
        try:
            with lock_file(stale / "lock", wait=False):
                shutil.rmtree(stale, ignore_errors=True)
        except OSError:  # of another user, or in use
            continue
    # The lock is held before the folder has the name that others look for.
    unnamed = folder.with_name(f".{folder.name}")
    unnamed.mkdir(0o700)
    lock = lock_file(unnamed / "lock")
    unnamed.rename(folder)
    return lock


def remove_folder(folder: pathlib.Path) -> None:
    """Deletes the folder of a cache, also while others still write to it."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
