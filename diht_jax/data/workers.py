"""Decoding worker processes: what they need of this machine, and their end with their parent.

grain starts the workers by `spawn` and hands batches on in segments of POSIX shared memory.
Python's resource tracker, a process of its own, removes the segments that are left when parent and
workers have all ended; so a worker that outlives its parent keeps them all.
"""

from __future__ import annotations

import os
import threading
import time

from absl import logging

SHARED_MEMORY = "/dev/shm"
# How often a worker looks for its parent.
_POLL_SECS = 1.0


def end_with_parent(parent: int, *_: int) -> None:
    """Ends this process soon after its parent has ended, however that happened.

    A thread polls. The kernel's own signal for it (PR_SET_PDEATHSIG) comes when the thread that
    started this process ends, and grain starts workers in threads that end at once.

    Args:
        parent: process id of the process that started this one.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECS)
        # Without clean-up: that waits for the parent, to empty the queues to it.
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def usable_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_workers(num_workers: int, prefetch_batches: int, batch_bytes: int) -> None:
    """Compares what the decoding workers need with what this machine has, before they start.

    Args:
        num_workers: decoding processes of this process, at least 1.
        prefetch_batches: batches decoded ahead, by each worker.
        batch_bytes: size of one batch of this process.

    Raises:
        ValueError: the batches in flight do not fit into shared memory. A worker that writes there
            when it is full is killed by the kernel (SIGBUS).
    """
    cores = usable_cores()
    if num_workers > cores:
        logging.warning(
            "config.data.num_workers=%d, but this process may use %d cores; lower it, or give the "
            "process more cores (Slurm: srun --cpus-per-task)",
            num_workers,
            cores,
        )
    # Of each worker: those that it has decoded, as many that wait in this process, one being
    # decoded and one on its way; and two of the training loop's.
    num_batches = num_workers * (2 * prefetch_batches + 2) + 2
    needed = num_batches * batch_bytes
    free = _free_shared_memory()
    if free is None or needed <= free:
        return
    raise ValueError(
        f"{SHARED_MEMORY} has {_megabytes(free)} free, but {num_batches} batches in flight of "
        f"{_megabytes(batch_bytes)} each (config.data.num_workers={num_workers}, "
        f"config.data.prefetch_batches={prefetch_batches}) need {_megabytes(needed)}. Containers "
        "have 64 MB by default: start them with more (docker run --shm-size=32g; in Kubernetes an "
        "emptyDir with `medium: Memory` mounted at /dev/shm), lower the two keys, or decode in "
        "threads (config.data.num_workers=0)"
    )


def _free_shared_memory() -> int | None:
    """Bytes; None where shared memory is no file system that can be asked."""
    try:
        stats = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
