"""The read-ahead of one host as its training process sees it: start, progress, bound and end."""

from __future__ import annotations

import atexit
import dataclasses
import multiprocessing
import os
import threading
from typing import Any, BinaryIO

from absl import logging

from diht_jax.input.block_order import BlockOrder
from diht_jax.input.in_flight import describe_bytes
from diht_jax.input.mixing import Mixture, SourcePlan
from diht_jax.input.read_ahead.block_cache import (
    BlockCache,
    CachedRecords,
    claim_folder,
    new_folder,
    remove_folder,
)
from diht_jax.input.read_ahead.bound import ReadAheadOptions, measure_footprint
from diht_jax.input.read_ahead.reader import ReadSettings, run_reader
from diht_jax.input.sub_batches import rows_of_part
from diht_jax.storage.stores import is_remote

# Deaths of the reader process, without a block between them, that a run survives.
MAX_RESTARTS = 3
# Of the planned positions, beside those that are decoded: rounds of all threads.
_ROUNDS_AHEAD = 2
# Sub-batches that a worker holds at least; in threads there are about as many as of four workers.
_PARTS_PER_WORKER, _FEW_WORKERS = 4, 4
# How often the parent looks at the reader; how many such looks lie between two lines of the log.
_POLL_SECS, _POLLS_PER_LINE = 0.5, 30
_KILL_SECS = 5.0


class ReadAhead:
    """Fetches the blocks of one order ahead, between `start` and `stop`.

    Attributes:
        records: to be read in place of the source.
    """

    def __init__(
        self,
        source: Any,
        order: BlockOrder | SourcePlan,
        options: ReadAheadOptions,
        *,
        batch_size: int,
        batches_in_flight: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Compares what the blocks need with their bound; starts nothing.

        Args:
            source: records with `extent`, `cut` and `unpack`, such as `TFRecordSource`.
            order: of the run.
            options: see there.
            batch_size: global, in positions of the order.
            batches_in_flight: that are decoded ahead, rounded up.
            process_index, process_count: this host's number, and how many there are.

        Raises:
            ValueError: the blocks of all windows do not fit into the bound, or there is no such
                folder.
        """
        self._source, self._order, self._options = source, order, options
        self._num_blocks = len(order.block_starts) - 1
        block_records = order.num_records / self._num_blocks
        ahead = (batches_in_flight + 1) * batch_size
        share = getattr(order, "share", 1.0)  # of the positions that come from this source
        ahead += int(_ROUNDS_AHEAD * options.read_threads * block_records * process_count / share)
        footprint = measure_footprint(
            source,
            order,
            ahead=int(ahead * share),
            batch_size=batch_size,
            process_count=process_count,
        )
        footprint.check(order, options)
        self._needed_bytes = footprint.needed_bytes(order.num_streams, order.window_blocks)
        pool = order.num_streams * order.window_blocks * block_records
        self._settings = ReadSettings(
            ahead=ahead,
            # Each plan looks at all windows once, so there are few of them in a window's life.
            plan_step=max(batch_size, int(pool / share / 16)),
            batch_size=batch_size,
            process_index=process_index,
            process_count=process_count,
            num_threads=options.read_threads,
            bound_bytes=options.bound_bytes(),
            timeout_secs=options.read_timeout_secs,
        )
        self._folder = new_folder(options.parent)
        self.records = CachedRecords(source, order.block_starts, self._folder)
        self._run: _Run | None = None

    @property
    def is_running(self) -> bool:
        """Between `start` and `stop`."""
        return self._run is not None

    @property
    def process_id(self) -> int | None:
        """Of the reader."""
        return None if self._run is None else self._run.process.pid

    @property
    def numbers(self) -> dict[str, int]:
        """Counts of blocks, bytes and requests by name, while it runs."""
        if self._run is None:
            return {}
        sizes = {"needed_bytes": self._needed_bytes, "bound_bytes": self._settings.bound_bytes}
        return self._run.cache.numbers() | sizes

    def start(self, position: int) -> None:
        """Begins to fetch what is needed from a position on; blocks of before are gone.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.stop()
        lock = claim_folder(self._folder)
        cache = BlockCache.create(self._folder, self._num_blocks)
        cache["position"] = position
        logging.info(
            "read-ahead: %d threads fetch blocks into %s; planned are about %s, at most %s "
            "(config.data.read_ahead_gib)",
            self._options.read_threads,
            self._folder,
            describe_bytes(self._needed_bytes),
            describe_bytes(self._settings.bound_bytes),
        )
        arguments = (os.getpid(), self._folder, self._source, self._order, self._settings)
        self._run = _Run(cache, lock, arguments)
        atexit.register(self.stop)

    def advance(self, position: int) -> None:
        """Everything before a position was used."""
        if self._run is not None:
            self._run.cache["position"] = position

    def stop(self) -> None:
        """Ends the process and deletes the blocks; records that are awaited end with an error."""
        run, self._run = self._run, None
        if run is not None:
            run.stop()
            self.records.forget()
            atexit.unregister(self.stop)

    def describe(self) -> str:
        """What it does, in a few words."""
        return "no read-ahead" if self._run is None else self._run.describe()


class _Run:
    """A reader process, and the thread that starts it again and logs its progress."""

    def __init__(self, cache: BlockCache, lock: BinaryIO, arguments: tuple[Any, ...]):
        self.cache = cache
        self._lock = lock
        self._arguments = arguments
        self._stopping = threading.Event()
        self.process = self._start_process()
        self._monitor = threading.Thread(target=self._watch, name="read_ahead", daemon=True)
        self._monitor.start()

    def stop(self) -> None:
        """Ends both, and deletes the folder."""
        self.cache["is_stopped"] = 1
        self._stopping.set()
        self._monitor.join()
        self.process.kill()
        self.process.join(_KILL_SECS)
        remove_folder(self.cache.folder)
        self._lock.close()

    def describe(self) -> str:
        cache = self.cache
        text = (
            f"read-ahead: process {self.process.pid}, {cache['blocks']} blocks fetched, "
            f"{describe_bytes(cache['bytes'])} in {cache.folder}, {cache['requests']} requests"
        )
        if cache["failed_requests"]:
            text += f", {cache['failed_requests']} of them failed, the last by {cache.problem()}"
        return text

    def _start_process(self) -> multiprocessing.Process:
        # As grain starts its workers; libraries of object stores do not survive a fork.
        process = multiprocessing.get_context("spawn").Process(
            target=run_reader, args=self._arguments, name="block_reader", daemon=True
        )
        process.start()
        return process

    def _watch(self) -> None:
        deaths = blocks = 0
        log = _ProgressLog(self.cache)
        while not self._stopping.wait(_POLL_SECS):
            log.look()
            if self.process.is_alive() or self.cache["has_failed"]:
                continue
            deaths = 1 if self.cache["blocks"] > blocks else deaths + 1
            blocks = self.cache["blocks"]
            code = self.process.exitcode
            if deaths > MAX_RESTARTS:
                self.cache.fail(
                    f"the process that fetches blocks died {deaths} times in a row (exit code "
                    f"{code}); if memory is short, lower config.data.read_ahead_gib, "
                    "config.data.num_streams or config.data.window_blocks"
                )
                continue
            logging.warning(
                "read-ahead: the process that fetches blocks ended (exit code %s); it is started "
                "again, and goes on with the blocks that are there",
                code,
            )
            self.process = self._start_process()


class _ProgressLog:
    """Lines of the log about the first blocks, failing requests and a cache that is full."""

    def __init__(self, cache: BlockCache):
        self._cache = cache
        self._looks = 0
        self._is_filling = True
        self._failed = self._failed_at = 0
        self._was_full = False

    def look(self) -> None:
        """Logs what is new; a line of each kind at most every few looks."""
        cache = self._cache
        if not cache["is_planned"]:
            return
        self._looks += 1
        if self._is_filling:
            self._is_filling = cache["fetched_bytes"] < cache["planned_bytes"]
            if not self._is_filling or self._looks % _POLLS_PER_LINE == 1:
                logging.info(
                    "read-ahead: %s of %s of the first blocks fetched (%d requests)",
                    describe_bytes(min(cache["fetched_bytes"], cache["planned_bytes"])),
                    describe_bytes(cache["planned_bytes"]),
                    cache["requests"],
                )
        failed = cache["failed_requests"]
        is_due = not self._failed or self._looks >= self._failed_at + _POLLS_PER_LINE
        if failed > self._failed and is_due:
            logging.warning(
                "read-ahead: %d requests failed so far and are tried again, the last: %s",
                failed,
                cache.problem(),
            )
            self._failed, self._failed_at = failed, self._looks
        if cache["is_full"] and not self._was_full:
            self._was_full = True
            logging.warning(
                "read-ahead: blocks that are needed now do not fit into the bound, and their "
                "records are read one by one, which is slow; raise config.data.read_ahead_gib"
            )


def open_read_aheads(
    mixture: Mixture,
    options: ReadAheadOptions,
    *,
    batch_size: int,
    num_workers: int,
    prefetch_batches: int,
    process_index: int,
    process_count: int,
) -> tuple[list[ReadAhead], Mixture]:
    """The read-ahead of each source that has one: in blocks, from an object store.

    Args:
        mixture: the sources of the run.
        options: see `ReadAhead`; the sources share threads and bound evenly.
        batch_size: global.
        num_workers, prefetch_batches: how far decoding works ahead.
        process_index, process_count: this host's number, and how many there are.

    Returns:
        Them, and the mixture that reads what they have fetched.

    Raises:
        ValueError: see `ReadAhead`.
    """
    numbers = [
        number
        for number, source in enumerate(mixture.sources)
        if isinstance(source.order, BlockOrder)
        and any(map(_is_in_store, getattr(source.records, "paths", ())))
    ]
    if len(numbers) > 1:
        threads = -(-options.read_threads // len(numbers))
        options = dataclasses.replace(options, read_threads=threads, num_sources=len(numbers))
    # The queues of each worker, or of the threads, hold four sub-batches at least.
    rows = rows_of_part(batch_size // process_count) * process_count
    queued = max(num_workers, _FEW_WORKERS) * _PARTS_PER_WORKER * rows
    read_aheads = []
    for number in numbers:
        ahead = ReadAhead(
            mixture.sources[number].records,
            mixture.plan(number),
            options,
            batch_size=batch_size,
            batches_in_flight=prefetch_batches - (-queued // batch_size),
            process_index=process_index,
            process_count=process_count,
        )
        read_aheads.append(ahead)
        mixture = mixture.with_records(number, ahead.records)
    return read_aheads, mixture


def _is_in_store(path: str) -> bool:
    # What lies in fsspec's memory is known to this process alone.
    return is_remote(path) and not path.startswith("memory://")
