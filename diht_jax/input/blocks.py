"""Read-ahead of blocks of records from an object store.

Every decoding worker determines which blocks its next sub-batches need, and fetches them in threads
into a folder that all workers of the host share, in shared memory or on a local disk. A lock makes
sure that only one worker fetches a block while the others wait. The kernel releases it when its
holder ends, so a dead worker does not block others. The training process deletes a block when the
windows of the upcoming records, up to the last requested one, no longer contain it. These windows
may belong to the next epoch.

The file of a block contains the offsets of its records, followed by the fetched bytes::

    uint64 [n + 1] offset of each record in the file, and the end of the last one | bytes
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import pathlib
import queue
import random
import secrets
import struct
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any, TypeVar

import ml_collections
import numpy as np
from absl import logging

from diht_jax.input.order import BlockOrder
from diht_jax.input.workers import (
    SHARED_MEMORY,
    available_memory,
    claim_mark,
    remove_folder,
    run_in_thread,
)
from diht_jax.records.shard_files import TFRecordError
from diht_jax.storage.locks import LockedError, lock_file
from diht_jax.storage.stores import RangesFile, StorageError, is_missing, is_outage, retry

_Result = TypeVar("_Result")

_PLACES = struct.Struct("<2Q")
# A request without an answer is repeated after this time, with exponential backoff.
_PATIENCE_SECS, _MAX_REQUESTS = 10.0, 4
_POLL_SECS = 0.5  # between checks whether the input was closed
_FIRST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.1, 5.0  # after a failure
_LOG_SECS = 15  # between log messages about failures
# Number of blocks from which the mean block size is estimated.
_SAMPLED_BLOCKS = 64

clock, sleep = time.monotonic, time.sleep  # replaced by tests


class ReadAheadStopped(RuntimeError):
    """The input was closed before the record was fetched."""


# Errors that are not retried.
_LASTING = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    NotImplementedError,
    ReadAheadStopped,
)


def bound_bytes(data: ml_collections.ConfigDict) -> int:
    """Returns the size limit in bytes of the blocks of all sources.

    It is `config.data.read_ahead_gib` if set, else half of the free space of their folder, and in
    shared memory also at most a quarter of this process's available memory.
    """
    if data.read_ahead_gib is not None:
        return int(data.read_ahead_gib * 2**30)
    stats = os.statvfs(data.cache_dir or SHARED_MEMORY)
    free = stats.f_bavail * stats.f_frsize // 2
    memory = available_memory()
    return free if data.cache_dir or memory is None else min(free, memory // 4)


@dataclasses.dataclass(eq=False)
class BlockStore:
    """The fetched blocks of one source on a host; every process has its own object.

    Attributes:
        folder: folder of the blocks between `start` and `stop`, else None.
        stays: whether blocks are kept for later epochs, because all of them are held anyway or fit
            into the folder or size limit that the user has set.
    """

    source: Any  # has `extent`, `cut` and `unpack` like `TFRecordSource`
    order: BlockOrder  # of the records
    data: dataclasses.InitVar[ml_collections.ConfigDict]
    # This host's decoding processes (0 for threads), which share `data.read_threads`.
    num_processes: int = 1

    def __post_init__(self, data: ml_collections.ConfigDict):
        """Fetches nothing yet.

        Raises:
            ValueError: the folder does not exist or is not writable.
        """
        parent = data.cache_dir or SHARED_MEMORY
        mark = claim_mark(parent)
        if mark is None:
            raise ValueError(
                f"config.data.cache_dir={data.cache_dir}: {parent} is no folder that "
                "can be written to; expected one on a local disk, for the blocks that are fetched "
                "ahead"
            )
        self._prefix = f"{parent}/{mark}_blocks_"
        self._timeout_secs = data.read_timeout_secs
        self._num_threads = -(-data.read_threads // max(1, self.num_processes))
        self.folder: pathlib.Path | None = None
        self.stays = False
        self._prepare()

    def __getstate__(self) -> dict[str, Any]:
        of_process = ("_queue", "_starting", "_stopped", "_kept")
        return {name: value for name, value in self.__dict__.items() if name not in of_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    def start(self) -> None:
        """Creates an empty folder for blocks, unless it is already started."""
        if self.folder is None:
            self.folder = pathlib.Path(self._prefix + secrets.token_hex(8))
            self.folder.mkdir(0o700)
            atexit.register(remove_folder, self.folder)

    def stop(self) -> None:
        """Deletes all blocks; threads of this process that wait for a block raise an error."""
        self._stopped.set()
        if self.folder is not None:
            remove_folder(self.folder)
        self.folder = None
        self._prepare()

    def request(self, block: int) -> None:
        """Starts to fetch a block in a thread, unless it is already local."""
        if os.path.exists(self._path(block)):
            return
        with self._starting:
            if self._queue is None:
                self._queue = queue.SimpleQueue()
                for _ in range(self._num_threads):
                    arguments = (self._queue, self._stopped)
                    threading.Thread(target=self._fetch_queued, args=arguments, daemon=True).start()
            self._queue.put(block)

    def read(self, record: int, *, fetch: bool = False) -> Any:
        """Returns the element of a record, or None if its block is not local and not `fetch`.

        Raises:
            TFRecordError: as in `TFRecordSource`; or the shard or its index was replaced.
            StorageError: a block cannot be read from the store or written to the folder.
            ReadAheadStopped: the input was closed.
        """
        if self.folder is None:  # a process that does not decode
            return None
        block = self.order.block_of(record)
        path, number = self._path(block), record - int(self.order.block_starts[block])

        def read_piece() -> bytes:
            file = os.open(path, os.O_RDONLY)
            try:
                start, end = _PLACES.unpack(os.pread(file, _PLACES.size, 8 * number))
                return os.pread(file, end - start, start)
            finally:
                os.close(file)

        try:
            piece = retry(read_piece, path)
        except FileNotFoundError:
            if not fetch:
                return None
            self._fetch(block, wait=True)
            return self.read(record)
        return self.source.unpack(record, piece)

    def keep(self, blocks: set[int]) -> None:
        """Deletes the blocks that were passed to the previous call and are not in `blocks`."""
        for block in self._kept - blocks:
            for ending in ("block", "lock"):
                pathlib.Path(self._path(block, ending)).unlink(missing_ok=True)
        self._kept = blocks

    def describe(self) -> str:
        """Describes the number of local blocks, for a log message about a slow input."""
        if self.folder is None:
            return "no block of the object store is here"
        return f"{len(list(self.folder.glob('*.block')))} blocks are in {self.folder}"

    def mean_block_bytes(self) -> float:
        """Estimates the mean number of bytes of a block from a sample of blocks."""
        starts = self.order.block_starts
        sampled = np.unique(np.linspace(0, len(starts) - 2, _SAMPLED_BLOCKS).astype(int))
        extents = [self.source.extent(int(starts[n]), int(starts[n + 1])) for n in sampled]
        return sum(end - start for _, start, end in extents) / len(extents)

    def _prepare(self) -> None:
        self._queue: queue.SimpleQueue[int] | None = None
        self._starting = threading.Lock()
        self._stopped = threading.Event()
        self._kept: set[int] = set()

    def _path(self, block: int, ending: str = "block") -> str:
        if self.folder is None:
            raise ReadAheadStopped("the input was closed")
        return f"{self.folder}/{block}.{ending}"

    def _fetch_queued(self, blocks: queue.SimpleQueue[int], stopped: threading.Event) -> None:
        while not stopped.is_set():
            # Errors are ignored here, because `read` encounters them again.
            with contextlib.suppress(queue.Empty, ValueError, OSError, ReadAheadStopped):
                self._fetch(blocks.get(timeout=_POLL_SECS), wait=False)

    def _fetch(self, block: int, *, wait: bool) -> None:
        """Fetches a block unless it is local; `wait` is for one that another process fetches."""
        path, lock, stopped = self._path(block), self._path(block, "lock"), self._stopped
        if os.path.exists(path):  # several workers request the same block
            return
        with contextlib.suppress(LockedError), lock_file(lock, wait=wait, names_holder=False):
            if os.path.exists(path):
                return
            parts = self._read_block(block, stopped)
            # The name is unique, because some file systems have no locks.
            unfinished = self._path(block, f"{secrets.token_hex(4)}.part")
            try:
                with open(unfinished, "wb") as file:
                    file.writelines(parts)
                os.replace(unfinished, path)
            except OSError as error:
                pathlib.Path(unfinished).unlink(missing_ok=True)
                if stopped.is_set():
                    raise ReadAheadStopped("the input was closed") from error
                raise StorageError(
                    f"{self.folder}: a block that was fetched ahead cannot be written "
                    f"({error.strerror or error}); free some space, set config.data.cache_dir to "
                    "another disk, or lower config.data.num_streams or config.data.window_blocks"
                ) from error

    def _read_block(self, block: int, stopped: threading.Event) -> list[bytes]:
        """Reads a block from the store, and returns the contents of its file."""
        first, end = map(int, self.order.block_starts[block : block + 2])

        def read() -> bytes:
            if stopped.is_set():  # during the pause before a retry
                raise ReadAheadStopped("the input was closed")
            extent = self.source.extent(first, end)
            return _first_answer(lambda: read_extent(*extent), stopped)

        try:
            data = read_patiently(read, self._timeout_secs)
        except (TFRecordError, ReadAheadStopped):
            raise
        except Exception as error:
            path = self.source.locate(first)[0]
            raise StorageError(
                f"{path} could not be read (config.data.read_timeout_secs={self._timeout_secs:g} "
                f"is how long a store may fail): {error}"
            ) from error
        starts = np.asarray(self.source.cut(first, end, data), np.int64)
        return [(starts + 8 * len(starts)).astype("<u8").tobytes(), data]


def read_patiently(read: Callable[[], _Result], timeout_secs: float) -> _Result:
    """Calls a function until it succeeds or times out, with pauses that double up to 5 s.

    Errors known to be permanent are raised at once. All others are retried, because every store
    has its own error classes.
    """
    began, pause_secs = clock(), _FIRST_PAUSE_SECS
    while True:
        try:
            return read()
        except Exception as error:
            if isinstance(error, StorageError):
                may_pass = is_outage(error)
            elif isinstance(error, OSError):
                may_pass = not (is_missing(error) or isinstance(error, PermissionError))
            else:
                may_pass = not isinstance(error, _LASTING)
            if not may_pass or clock() - began >= timeout_secs:
                raise
            message = "%s; reading it is tried again for %g s at most"
            logging.log_every_n_seconds(logging.WARNING, message, _LOG_SECS, error, timeout_secs)
        sleep(pause_secs * (0.5 + random.random() / 2))  # jitter, for hosts that fail together
        pause_secs = min(2 * pause_secs, _LONGEST_PAUSE_SECS)


def _first_answer(read: Callable[[], bytes], stopped: threading.Event) -> bytes:
    """Returns the first result of a request, which is repeated while no answer comes.

    An error of the latest request is raised; errors of earlier ones are ignored. Every request has
    its own thread, because a thread cannot be ended if a library call never returns. Raises
    TimeoutError if no request is answered.
    """
    waiting: set[futures.Future[bytes]] = set()
    for number in range(_MAX_REQUESTS):
        latest, asked = run_in_thread(read, "read_block"), clock()
        waiting.add(latest)
        while clock() - asked < _PATIENCE_SECS * 2**number:
            done, waiting = futures.wait(waiting, _POLL_SECS, futures.FIRST_COMPLETED)
            for answer in sorted(done, key=lambda each: each.exception() is not None):
                if answer is latest or answer.exception() is None:
                    return answer.result()
            if not done and stopped.is_set():
                raise ReadAheadStopped("the input was closed")
    raise TimeoutError("no answer came")


def read_extent(path: str, start: int, end: int) -> bytes:
    """Reads a byte range of a remote or local file; raises TimeoutError if bytes are missing."""
    data = RangesFile(path, end).read_range(start, end)
    if len(data) != end - start:
        raise TimeoutError(f"{path}: {len(data)} bytes came instead of {end - start}")
    return data
