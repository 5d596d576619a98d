"""Memory of the training input: the decoded examples that are in flight, and their bound.

Examples wait in four places: one sub-batch in the memory of each worker, being decoded; sub-batches
in shared memory, between a worker and this process; those that are being joined; and two joined
batches of the host, the one that is made and the one that goes to the devices.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib

from absl import logging

from diht_jax.input.sub_batches import COPYING_THREADS
from diht_jax.input.workers import CGROUP, SHARED_MEMORY

_MEMINFO = pathlib.Path("/proc/meminfo")
# Limit, use, and statistics of the control group, as a container sees its own; version 2 and 1.
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
# Batches of this process beside the workers': one that is joined, one on its way to the devices.
_JOINED_BATCHES = 2


@dataclasses.dataclass(frozen=True)
class InFlight:
    """How far the input works ahead, and what that takes at most.

    Attributes:
        num_workers: decoding processes; 0 decodes in threads of this process.
        num_threads: those threads.
        prefetch_batches: the host's batches to decode ahead.
        rows: of a sub-batch.
        parts_per_batch: sub-batches of the host's batch.
        example_bytes: of one decoded example.
    """

    num_workers: int
    num_threads: int
    prefetch_batches: int
    rows: int
    parts_per_batch: int
    example_bytes: int

    @property
    def part_bytes(self) -> int:
        """Of a sub-batch."""
        return self.rows * self.example_bytes

    @property
    def queue_parts(self) -> int:
        """Sub-batches in each of the two queues of a worker, on its side and on this one.

        One more is on its way into each; so `prefetch_batches` are ahead, or what that rounds up
        to: every worker works ahead by four sub-batches at the least.
        """
        ahead = self.prefetch_batches * self.parts_per_batch
        return max(1, -(-ahead // (2 * max(1, self.num_workers))) - 1)

    @property
    def thread_parts(self) -> int:
        """Sub-batches that the threads of this process have begun or done."""
        return max(self.num_threads, self.prefetch_batches * self.parts_per_batch)

    @property
    def shared_bytes(self) -> int:
        """At most, in shared memory."""
        if not self.num_workers:
            return 0
        parts = self.num_workers * (2 * self.queue_parts + 2)
        # A batch of one part stays where it is.
        parts += _JOINED_BATCHES if self.parts_per_batch == 1 else COPYING_THREADS
        return parts * self.part_bytes

    @property
    def process_bytes(self) -> int:
        """At most, in the memory of the processes."""
        is_joined = self.parts_per_batch > 1 or not self.num_workers
        joined = _JOINED_BATCHES * self.parts_per_batch if is_joined else 0
        return ((self.num_workers or self.thread_parts) + joined) * self.part_bytes

    def check(self, max_gib: float | None) -> None:
        """Logs what is in flight at most, and compares it with its bound.

        Args:
            max_gib: of `config.data.max_in_flight_gib`; None allows what is free.

        Raises:
            ValueError: it is more. A worker that writes to shared memory when that is full is
                killed by the kernel (SIGBUS).
        """
        total = self.shared_bytes + self.process_bytes
        decoders = (
            f"{self.num_workers} workers"
            if self.num_workers
            else f"{self.num_threads} threads of this process"
        )
        logging.info(
            "input: %s decode sub-batches of %d examples (%s); in flight are at most %s: %s in "
            "shared memory, %s in processes (config.data.prefetch_batches=%d)",
            decoders,
            self.rows,
            describe_bytes(self.part_bytes),
            describe_bytes(total),
            describe_bytes(self.shared_bytes),
            describe_bytes(self.process_bytes),
            self.prefetch_batches,
        )
        if max_gib is not None and total > max_gib * 2**30:
            self._refuse(
                f"config.data.max_in_flight_gib={max_gib} is {describe_bytes(max_gib * 2**30)}",
                total,
                "lower the two keys, or raise it",
            )
        shared = free_shared_memory()
        if shared is not None and self.shared_bytes > shared:
            self._refuse(
                f"{SHARED_MEMORY} has {describe_bytes(shared)} free",
                self.shared_bytes,
                "containers have 64 MB by default: start them with more (docker run "
                "--shm-size=32g; in Kubernetes an emptyDir with `medium: Memory` mounted at "
                "/dev/shm), lower the two keys, or decode in threads (config.data.num_workers=0)",
            )
        memory = available_memory()
        if max_gib is None and memory is not None and total > memory:
            self._refuse(
                f"this process may take {describe_bytes(memory)} more memory",
                total,
                "lower the two keys, or give it more; config.data.max_in_flight_gib replaces "
                "this bound",
            )

    def _refuse(self, bound: str, needed: int, advice: str) -> None:
        batch_bytes = self.parts_per_batch * self.part_bytes
        raise ValueError(
            f"{bound}, but decoded examples in flight (config.data.num_workers={self.num_workers}, "
            f"config.data.prefetch_batches={self.prefetch_batches}; this host's batch has "
            f"{describe_bytes(batch_bytes)}, a sub-batch {describe_bytes(self.part_bytes)}) need "
            f"{describe_bytes(needed)}; {advice}"
        )


def free_shared_memory() -> int | None:
    """Bytes; None where shared memory is no file system that can be asked."""
    try:
        stats = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize


def available_memory() -> int | None:
    """Bytes that this process can still take, of the machine and of its container.

    Returns:
        None where the system does not tell.
    """
    found = [_available_in_group(*names) for names in _CGROUPS]
    with contextlib.suppress(OSError, KeyError):
        found.append(1024 * _read_fields(_MEMINFO)["MemAvailable:"])
    return min((size for size in found if size is not None), default=None)


def _available_in_group(limit: str, use: str, statistics: str) -> int | None:
    try:
        limit_bytes, used_bytes = (int((CGROUP / name).read_text()) for name in (limit, use))
        fields = _read_fields(CGROUP / statistics)
    except (OSError, ValueError):  # no such group, or "max"
        return None
    # Files that were read count as used until somebody needs the memory; shared memory does count.
    cached = fields.get("file", fields.get("cache", 0)) - fields.get("shmem", 0)
    return max(0, limit_bytes - used_bytes + max(0, cached))


def _read_fields(path: pathlib.Path) -> dict[str, int]:
    """The lines "name number ..." of a file."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def describe_bytes(size: float) -> str:
    """Such as "67.1 MB" or "12.3 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
