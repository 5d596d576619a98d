"""Read-ahead: whole blocks of records are fetched from an object store before they are decoded.

A process beside the decoding workers fetches the blocks that the order needs next, with many
requests at a time, and writes them into a cache (`block_cache.py`): in shared memory, or on a disk.
Blocks whose last record was used are deleted. A process of its own, since the threads of the
training process would hold up its steps.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import os
import pathlib
import signal
from typing import Any, Protocol

import numpy as np

from diht_jax.input.read_ahead.block_cache import DIRECT, PLANNED, READY, BlockCache, remove_folder
from diht_jax.input.read_ahead.fetching import Fetcher, try_patiently
from diht_jax.input.workers import start_worker
from diht_jax.records.format import TFRecordError
from diht_jax.storage.retries import StorageError
from diht_jax.storage.stores import is_remote, open_system

# How long the reader waits for an answer before it looks at the position again.
_POLL_SECS = 0.01


class BlockPlan(Protocol):
    """What the read-ahead needs of an order."""

    block_starts: np.ndarray

    def upcoming_blocks(
        self, first_position: int, num_positions: int, process_index: int, process_count: int
    ) -> list[tuple[int, int, int]]:
        """As of `order.BlockOrder`."""


@dataclasses.dataclass(frozen=True)
class ReadSettings:
    """What the reader process is given.

    Attributes:
        ahead: positions of the run, from the next one that is used, whose blocks are fetched.
        plan_step: positions that are planned at a time.
        batch_size: global.
        process_index, process_count: this host's number, and how many there are.
        num_threads: blocks that are requested at the same time.
        bound_bytes: of blocks that are here or on their way.
        timeout_secs: how long a block may fail.
    """

    ahead: int
    plan_step: int
    batch_size: int
    process_index: int
    process_count: int
    num_threads: int
    bound_bytes: int
    timeout_secs: float


@dataclasses.dataclass
class _Need:
    """A block of the plan; `size` is 0 until it is requested."""

    last: int
    size: int = 0


class Reader:
    """Keeps a cache filled with what the next positions need."""

    def __init__(
        self,
        cache: BlockCache,
        source: Any,
        order: BlockPlan,
        settings: ReadSettings,
        **fetcher_options: Any,
    ):
        """Plans from the cache's position on; what is ready in the cache is kept.

        Args:
            cache: of this host.
            source: records with `extent` and `cut`, such as `TFRecordSource`.
            order: which blocks are needed when.
            settings: see there.
            **fetcher_options: clock and threads, of `Fetcher`.
        """
        self._cache = cache
        self._source = source
        self._order = order
        self._settings = settings
        self._fetcher = Fetcher(
            self._request,
            self._finish,
            describe=self._describe,
            timeout_secs=settings.timeout_secs,
            **fetcher_options,
        )
        self._position = self._planned_until = cache["position"]
        self._needs: dict[int, _Need] = {}
        self._by_first: list[tuple[int, int]] = []  # heap: first need, block
        self._by_last: list[tuple[int, int]] = []  # heap: last need, block
        self._queue: collections.deque[tuple[int, int]] = collections.deque()
        self._late: set[int] = set()  # on their way, and not needed any more
        self._bytes = 0
        self._is_blocked = False
        self._plan()
        self._forget_others()
        self._cache["planned_blocks"] = cache["blocks"] + len(self._queue)
        sizes = [self._size(block) for _, block in self._queue]
        self._cache["planned_bytes"] = cache["fetched_bytes"] + sum(sizes)
        self._cache["is_planned"] = 1

    def step(self, wait_secs: float) -> None:
        """Looks at the position once, requests what is missing and takes what has come.

        Args:
            wait_secs: to wait at most for an answer.

        Raises:
            StorageError: a block cannot be read, or the cache not be written.
        """
        self._position = self._cache["position"]
        self._plan()
        self._release()
        self._request_more()
        for block in self._fetcher.poll(wait_secs):
            self._cache["blocks"] += 1
            self._cache["fetched_bytes"] += self._needs[block].size
            if block in self._late:
                self._late.remove(block)
                self._drop(block)
        self._report()

    def _plan(self) -> None:
        """Enters the blocks of further positions, and queues those that are near enough."""
        settings, end = self._settings, self._position + self._settings.ahead
        while self._planned_until < end:
            count = max(settings.plan_step, end - self._planned_until)
            listed = self._order.upcoming_blocks(
                self._planned_until, count, settings.process_index, settings.process_count
            )
            for block, first, last in listed:
                self._enter(block, first, last)
            self._planned_until += count
        while self._by_first and self._by_first[0][0] < end:
            first, block = heapq.heappop(self._by_first)
            if block not in self._needs:  # the position has jumped over it
                continue
            if self._cache.states[block] == READY:  # by a reader that was killed
                self._needs[block].size = self._size(block)
                self._bytes += self._needs[block].size
                continue
            self._queue.append((first, block))
            self._cache.states[block] = DIRECT if self._is_blocked else PLANNED

    def _enter(self, block: int, first: int, last: int) -> None:
        if last < self._position:
            return
        need = self._needs.get(block)
        if need is None:
            self._needs[block] = _Need(last)
            heapq.heappush(self._by_first, (first, block))
            heapq.heappush(self._by_last, (last, block))
        else:
            need.last = max(need.last, last)
            if block in self._late:
                self._late.remove(block)
                heapq.heappush(self._by_last, (need.last, block))

    def _forget_others(self) -> None:
        """Deletes what a reader that was killed has left: beyond the plan, or half written."""
        for path in self._cache.folder.glob(".*.tmp"):
            path.unlink()
        for block in np.flatnonzero(self._cache.states):
            if int(block) not in self._needs:
                self._cache.release(int(block))

    def _release(self) -> None:
        """Deletes the blocks whose last record was used."""
        while self._by_last and self._by_last[0][0] < self._position:
            last, block = heapq.heappop(self._by_last)
            need = self._needs[block]
            if need.last > last:  # it is needed again
                heapq.heappush(self._by_last, (need.last, block))
            elif block in self._fetcher:
                self._late.add(block)
            else:
                self._drop(block)

    def _drop(self, block: int) -> None:
        self._bytes -= self._needs.pop(block).size
        self._cache.release(block)

    def _request_more(self) -> None:
        settings = self._settings
        while self._queue and len(self._fetcher) < settings.num_threads:
            first, block = self._queue[0]
            need = self._needs.get(block)
            if need is None or need.size:  # nobody needs it any more, or it was queued twice
                self._queue.popleft()
                continue
            size = self._size(block)
            fits = self._bytes + size <= settings.bound_bytes
            if fits == self._is_blocked:
                self._set_blocked(not fits)
            if not fits:
                if first < self._position + settings.batch_size:
                    self._cache["is_full"] = 1
                return
            self._queue.popleft()
            need.size = size
            self._bytes += size
            self._fetcher.fetch(block)

    def _set_blocked(self, is_blocked: bool) -> None:
        """Records of queued blocks are read directly as long as the cache is full.

        A worker that waited for one would hold up the use of the blocks that are in the way.
        """
        self._is_blocked = is_blocked
        for _, block in self._queue:
            if block in self._needs and not self._needs[block].size:
                self._cache.states[block] = DIRECT if is_blocked else PLANNED

    def _report(self) -> None:
        cache, fetcher = self._cache, self._fetcher
        cache["bytes"] = self._bytes
        cache["peak_bytes"] = max(cache["peak_bytes"], self._bytes)
        cache["requests"] = fetcher.requests
        cache["hedged_requests"] = fetcher.hedged_requests
        if fetcher.failed_requests != cache["failed_requests"]:
            cache.set_problem(fetcher.last_error)
            cache["failed_requests"] = fetcher.failed_requests

    def _records(self, block: int) -> tuple[int, int]:
        starts = self._order.block_starts
        return int(starts[block]), int(starts[block + 1])

    def _size(self, block: int) -> int:
        records = self._records(block)
        try:
            # Requests only where no index of the data set has the extents.
            _, start, end = try_patiently(
                lambda: self._source.extent(*records), self._settings.timeout_secs
            )
        except OSError as error:
            raise StorageError(
                f"{self._source.locate(records[0])[0]}: where its records lie could not be read "
                f"({error}); look at the network, the store's status and the credentials, and run "
                "the command again; config.data.read_timeout_secs has how long a store may fail"
            ) from error
        return end - start

    def _describe(self, block: int) -> str:
        path, start, end = self._source.extent(*self._records(block))
        return f"{path}, bytes {start} to {end - 1}"

    def _request(self, block: int) -> bytes:
        return read_extent(*self._source.extent(*self._records(block)))

    def _finish(self, block: int, data: bytes) -> None:
        try:
            starts = self._source.cut(*self._records(block), data)
        except TFRecordError:
            # Reading the records one by one tells which of them is damaged, and how.
            self._cache.states[block] = DIRECT
            return
        try:
            self._cache.write(block, starts, data)
        except OSError as error:
            raise StorageError(
                f"{self._cache.folder}: the cache of the read-ahead cannot be written "
                f"({error.strerror or error}); free some space, set config.data.cache_dir to "
                "another disk, or lower config.data.read_ahead_gib"
            ) from error


def read_extent(path: str, start: int, end: int) -> bytes:
    """Some bytes of a file, local or in a store.

    Raises:
        OSError: fewer came.
    """
    if is_remote(path):
        system, name = open_system(path)
        data = system.cat_file(name, start=start, end=end)
    else:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), end - start, start)
    if len(data) != end - start:
        raise OSError(f"{len(data)} bytes came instead of {end - start}")
    return data


def run_reader(
    parent: int,
    folder: pathlib.Path,
    source: Any,
    order: BlockPlan,
    settings: ReadSettings,
) -> None:
    """The main function of the reader process.

    Args:
        parent: id of the process that started this one; it ends with that one, and then deletes
            the folder.
        folder: of the cache.
        source, order, settings: of `Reader`.
    """
    start_worker(parent, None, clean_up=lambda: remove_folder(folder))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C reaches all processes; the parent decides
    cache = BlockCache(folder)
    try:
        reader = Reader(cache, source, order, settings)
        while not cache["is_stopped"]:
            reader.step(_POLL_SECS)
    except StorageError as error:
        cache.fail(str(error))
    except Exception as error:
        cache.fail(f"the read-ahead ended with {type(error).__name__}: {error}")
        raise
