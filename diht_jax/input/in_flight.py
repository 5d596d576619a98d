"""Sub-batches in flight: the prefetch distance of the input, its memory, and joining of batches.

Examples are in four places: one sub-batch that each worker decodes in its memory; sub-batches in
shared memory between a worker and this process; sub-batches that are being joined; and two joined
batches of the host, one being filled and one being transferred to the devices.

A host's batch may have ten gigabytes. The kernel clears every page of new memory at its first use,
which takes longer than the copy. Therefore the memory of a batch is reused when its reference count
shows that nothing refers to it: no caller, view, transfer to a device, or JAX array on the CPU,
which may be a view of its source. A thread joins the next batch during the transfer of the
previous one.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import mmap
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import NamedTuple

import ml_collections
import numpy as np
from absl import logging

from diht_jax.input.blocks import BlockStore, bound_bytes
from diht_jax.input.workers import (
    SHARED_MEMORY,
    available_memory,
    describe_bytes,
    free_shared_memory,
    run_in_thread,
)

# Threads that copy sub-batches into their batch. One thread would copy about as fast as eight GPUs
# train. A copy does not hold the interpreter's lock.
COPYING_THREADS = 4
# Batches of this process: one that is being joined, one that is transferred to the devices.
JOINED_BATCHES = 2
# Interval at which a joining thread checks for reusable memory.
_LOOK_SECS = 0.005
# Timeout for the end of such a thread, which may wait for a sub-batch that is being decoded.
_END_SECS = 5.0
# Blocks fetched ahead, in multiples of the number of concurrent requests.
_ROUNDS_AHEAD = 2


@dataclasses.dataclass
class InFlight:
    """The prefetch distance of the input, and the memory that it needs.

    Attributes:
        queue_parts: capacity of each of the two queues of a worker (in the worker and in this
            process), in sub-batches. One more is being put into each. Together they hold
            `prefetch_batches`, rounded up; every worker is ahead by at least four sub-batches.
        thread_parts: sub-batches that the threads of this process decode or have decoded.
        begun_parts: upper bound of sub-batches, from the next batch on, that have been started.
        part_bytes: size of a sub-batch.
        shared_bytes: upper bound in shared memory.
        process_bytes: upper bound in the memory of the processes.
    """

    num_workers: int  # decoding processes; 0 decodes in threads of this process
    num_threads: int  # decoding threads of this process if there are no workers
    prefetch_batches: int  # number of the host's batches to decode ahead
    rows: int  # rows of a sub-batch
    parts_per_batch: int  # sub-batches of the host's batch
    example_bytes: int  # size of one decoded example

    def __post_init__(self):
        num_workers, parts_per_batch = self.num_workers, self.parts_per_batch
        self.part_bytes = self.rows * self.example_bytes
        ahead = self.prefetch_batches * parts_per_batch
        self.queue_parts = max(1, -(-ahead // (2 * max(1, num_workers))) - 1)
        self.thread_parts = max(self.num_threads, ahead)
        decoded = num_workers * (2 * self.queue_parts + 3) or self.thread_parts
        self.begun_parts = parts_per_batch + decoded
        shared_parts, process_parts = 0, self.thread_parts + JOINED_BATCHES * parts_per_batch
        if num_workers:
            shared_parts = num_workers * (2 * self.queue_parts + 2)
            process_parts = num_workers
            if parts_per_batch == 1:  # a batch of one part stays where it is
                shared_parts += JOINED_BATCHES
            else:
                shared_parts += COPYING_THREADS
                process_parts += JOINED_BATCHES * parts_per_batch
        self.shared_bytes = shared_parts * self.part_bytes
        self.process_bytes = process_parts * self.part_bytes

    def check(self, max_gib: float | None) -> None:
        """Logs the maximal memory in flight, and compares it with its limit.

        The limit is `config.data.max_in_flight_gib`, or the available memory if it is None. The
        kernel kills a worker that writes to full shared memory (SIGBUS).

        Raises:
            ValueError: the limit is exceeded.
        """
        total, threads = self.shared_bytes + self.process_bytes, f"{self.num_threads} threads"
        sizes = (self.part_bytes, total, self.shared_bytes, self.process_bytes)
        logging.info(
            "input: %s decode sub-batches of %d examples (%s); in flight are at most %s: %s in "
            "shared memory, %s in processes (config.data.prefetch_batches=%d)",
            f"{self.num_workers} workers" if self.num_workers else threads,
            self.rows,
            *map(describe_bytes, sizes),
            self.prefetch_batches,
        )
        shared = free_shared_memory() if self.shared_bytes else None
        memory = available_memory() if max_gib is None else None
        if max_gib is not None and total > max_gib * 2**30:
            bound = describe_bytes(max_gib * 2**30)
            self._refuse(f"config.data.max_in_flight_gib={max_gib} is {bound}", total, "raise it")
        if shared is not None and self.shared_bytes > shared:
            self._refuse(
                f"{SHARED_MEMORY} has {describe_bytes(shared)} free",
                self.shared_bytes,
                "start containers, which have 64 MB by default, with more (docker run "
                "--shm-size=32g; in Kubernetes an emptyDir with `medium: Memory` mounted at "
                "/dev/shm), or decode in threads (config.data.num_workers=0)",
            )
        if memory is not None and total > memory:
            self._refuse(
                f"this process may take {describe_bytes(memory)} more memory",
                total,
                "give it more; config.data.max_in_flight_gib replaces this bound",
            )

    def _refuse(self, bound: str, needed: int, advice: str) -> None:
        batch_bytes = self.parts_per_batch * self.part_bytes
        raise ValueError(
            f"{bound}, but decoded examples in flight "
            f"(config.data.num_workers={self.num_workers}, "
            f"config.data.prefetch_batches={self.prefetch_batches}; this host's batch has "
            f"{describe_bytes(batch_bytes)}, a sub-batch {describe_bytes(self.part_bytes)}) need "
            f"{describe_bytes(needed)}; lower the two keys, or {advice}"
        )

    def plan_blocks(
        self,
        stores: Sequence[BlockStore],
        data: ml_collections.ConfigDict,
        process_count: int,
    ) -> int:
        """Plans the read-ahead of blocks, logs their size, and compares it with its limit.

        A stream holds one window of W blocks. Further blocks are held by the read-ahead and by the
        windows that it has started.

        Returns:
            The read-ahead distance in sub-batches, from the one that is decoded to the one whose
            blocks are requested; a multiple of the workers, so the same worker decodes both.

        Raises:
            ValueError: the limit is exceeded; names the keys.
        """
        num_blocks = np.array([len(store.order.block_starts) - 1 for store in stores])
        block_bytes = np.array([store.mean_block_bytes() for store in stores])
        records = np.array([store.order.num_records for store in stores])
        block_records = float((records / num_blocks).min())
        stride = max(1, self.num_workers)
        rounds = _ROUNDS_AHEAD * data.read_threads * block_records / self.rows
        parts = math.ceil(rounds / stride) * stride
        ahead = math.ceil((self.begun_parts + parts) * self.rows / block_records)
        streams, window = stores[0].order.num_streams, stores[0].order.window_blocks
        held = -(-streams * window // process_count) + window + ahead
        bound, folder = bound_bytes(data), data.cache_dir or SHARED_MEMORY
        can_stay = data.cache_dir or data.read_ahead_gib is not None
        stay = (num_blocks <= held) | bool(can_stay and num_blocks @ block_bytes <= bound)
        needed = int(np.where(stay, num_blocks, held) @ block_bytes)
        for store, all_stay in zip(stores, stay.tolist(), strict=True):
            store.stays = all_stay
        logging.info(
            "blocks of the object store: about %s are kept in %s, which may take %s "
            "(config.data.read_ahead_gib)",
            describe_bytes(needed),
            folder,
            describe_bytes(bound),
        )
        if needed <= bound:
            return parts
        raise ValueError(
            f"the blocks that are fetched ahead need {describe_bytes(needed)} on this host "
            f"(config.data.num_streams={streams} over {process_count} processes, windows of "
            f"config.data.window_blocks={window} blocks of {describe_bytes(block_bytes.max())}, "
            f"and {ahead} blocks on their way), but may take {describe_bytes(bound)} in "
            f"{folder} (config.data.read_ahead_gib={data.read_ahead_gib}). Lower "
            "config.data.num_streams or config.data.window_blocks (which mixes less), or set "
            "config.data.cache_dir to a folder on a local disk with "
            f"{describe_bytes(2 * needed)} free, or config.data.read_ahead_gib="
            f"{np.ceil(needed / 2**30 * 1000) / 1000:.3f} where there is room for it; on more "
            "hosts each needs less"
        )


@dataclasses.dataclass
class BatchMemory:
    """A pool of reusable memory for joined batches."""

    # The bytes of each batch by name. All lent arrays are views of them.
    _batches: list[dict[str, np.ndarray]] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def is_short(self) -> bool:
        """Returns whether `JOINED_BATCHES` or more batches are in use."""
        return sum(_references(batch) > _UNUSED for batch in self._batches) >= JOINED_BATCHES

    def lend(self, part: dict[str, np.ndarray], num_parts: int) -> dict[str, np.ndarray]:
        """Returns uninitialised arrays [num_parts * rows, ...] for the parts of a batch."""
        with self._lock:  # the thread of a cancelled join may still be running
            wanted = {
                name: num_parts * array.nbytes + mmap.PAGESIZE for name, array in part.items()
            }
            unused = [batch for batch in self._batches if _references(batch) <= _UNUSED]
            fitting = (b for b in unused if {name: raw.nbytes for name, raw in b.items()} == wanted)
            batch = next(fitting, None)
            # Memory of another size, or of more batches than needed, is released.
            gone = [b for b in unused if b is not batch][JOINED_BATCHES - 1 :]
            self._batches = [b for b in self._batches if not any(b is other for other in gone)]
            if batch is None:
                batch = {name: np.empty(num_bytes, np.uint8) for name, num_bytes in wanted.items()}
                self._batches.append(batch)
            lent = {}
            for name, array in part.items():
                shape = (num_parts * len(array), *array.shape[1:])
                start = (
                    -batch[name].ctypes.data % mmap.PAGESIZE
                )  # page-aligned, so JAX on the CPU need not copy
                end = start + math.prod(shape) * array.itemsize
                lent[name] = batch[name][start:end].view(array.dtype).reshape(shape)
            return lent


def _references(batch: Mapping[str, np.ndarray]) -> int:
    """Returns the highest reference count of the arrays of a batch, including their views."""
    return max((sys.getrefcount(array) for array in batch.values()), default=0)


_UNUSED = _references({"": np.empty(1)})


class _Join(NamedTuple):
    """A batch that a thread is joining."""

    batch: futures.Future[dict[str, np.ndarray]]
    wanted: threading.Event  # a caller waits for the batch
    stopped: threading.Event  # the batch is cancelled


@dataclasses.dataclass
class Joiner:
    """Joins an endless sequence of parts to batches, one batch ahead.

    Joining ahead starts with the first `take`.
    """

    next_part: Callable[[], dict[str, np.ndarray]]  # returns the next part, [rows, ...] each
    num_parts: int  # of a batch; with one part there is no copy and no joining ahead
    memory: BatchMemory = dataclasses.field(default_factory=BatchMemory)
    _ahead: _Join | None = None

    def take(self) -> dict[str, np.ndarray]:
        """Returns the next batch.

        Raises:
            Exception: any exception of `next_part`; the previous parts of the batch are lost.
        """
        if self.num_parts == 1:
            return self.next_part()
        join, self._ahead = self._ahead or self._begin(), None
        join.wanted.set()
        batch = join.batch.result()
        self._ahead = self._begin()
        return batch

    def close(self) -> None:
        """Ends the thread and drops its batch or exception; the memory pool is kept."""
        join, self._ahead = self._ahead, None
        if join is not None:
            join.stopped.set()
            join.wanted.set()
            futures.wait([join.batch], _END_SECS)

    def _begin(self) -> _Join:
        wanted, stopped = threading.Event(), threading.Event()

        def next_part() -> dict[str, np.ndarray]:
            part = {} if stopped.is_set() else self.next_part()
            if stopped.is_set():
                raise InterruptedError("the input is closed")
            return part

        def join() -> dict[str, np.ndarray]:
            # Joining waits for reusable memory, unless a caller already waits for the batch.
            while self.memory.is_short() and not wanted.wait(_LOOK_SECS):
                pass
            return join_parts(next_part, self.num_parts, self.memory)

        return _Join(run_in_thread(join, "join_batch"), wanted, stopped)


def join_parts(
    next_part: Callable[[], dict[str, np.ndarray]], num_parts: int, memory: BatchMemory
) -> dict[str, np.ndarray]:
    """Joins the next parts, [rows, ...] each, and copies a part while waiting for the next one."""
    part = next_part()
    rows = len(next(iter(part.values())))
    batch = memory.lend(part, num_parts)

    def copy(part: dict[str, np.ndarray], first_row: int) -> None:
        for name, array in part.items():
            batch[name][first_row : first_row + rows] = array

    copies: collections.deque[futures.Future] = collections.deque()
    with futures.ThreadPoolExecutor(COPYING_THREADS, "copy_part") as pool:
        for number in range(num_parts):
            if number:
                part = next_part()
            # Limits the parts that wait to be copied, because they need memory.
            if len(copies) == COPYING_THREADS:
                copies.popleft().result()
            copies.append(pool.submit(copy, part, number * rows))
        del part
        for each in copies:
            each.result()
    return batch
