"""Decoding worker processes: what they need of this machine, what they do, and how they end.

grain starts the workers by `spawn` and hands batches on in segments of POSIX shared memory.
Python's resource tracker, a process of its own, removes the segments that are left when parent and
workers have all ended; so a worker that outlives its parent keeps them all. The tracker may be
killed too, as at the end of a cgroup. Therefore the names of a run's segments begin with a mark:
workers remove them in its stead, and if none was left, the next run on this machine does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import math
import multiprocessing
import os
import pathlib
import re
import secrets
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker, shared_memory
from typing import BinaryIO

from absl import logging

from diht_jax.storage.locks import lock_file

SHARED_MEMORY = "/dev/shm"
# How grain names its workers, and how it reports one that is gone.
_WORKER_NAME = "grain-process-prefetch"
_WORKER_DIED = re.compile(r"[Ww]orker process.*(terminated|died|exit)")
_EXIT_CODE = re.compile(r"exit code -(\d+)")
# What a crash within a library ends a process with.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or the network",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "ended",
}
# More have to be asked for: each takes memory, and so many feed eight of the fastest GPUs.
_MOST_BY_DEFAULT = 64
# The control group, as a container sees its own.
CGROUP = pathlib.Path("/sys/fs/cgroup")
# Its files with microseconds of processor time, and of what time; version 2 and 1.
_CPU_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
# The locks of this process, which are not to be closed.
_held: list[BinaryIO] = []
# How often a worker looks for its parent.
_POLL_SECS = 1.0
# How long the kernel may take to end a process.
_KILL_SECS = 5.0


def start_worker(
    parent: int, mark: str | None, *_: int, clean_up: Callable[[], None] | None = None
) -> None:
    """Marks this process's shared memory, and ends the process soon after its parent has ended.

    A thread polls. The kernel's own signal for it (PR_SET_PDEATHSIG) comes when the thread that
    started this process ends, and grain starts workers in threads that end at once.

    Args:
        parent: process id of the process that started this one.
        mark: the parent's `segment_mark`.
        clean_up: called when the parent has ended.
    """
    if mark is not None:
        # Python has no public way to name the segments that other code makes.
        shared_memory._make_filename = lambda: f"/{mark}_{secrets.token_hex(8)}"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECS)
        if mark is not None and not _tracker_is_alive():
            _remove_segments(mark)
        if clean_up is not None:
            clean_up()
        # Without clean-up: that waits for the parent, to empty the queues to it.
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


@functools.cache
def segment_mark() -> str | None:
    """How the names of shared memory begin that this process's workers make.

    The first call also removes the segments of processes that have ended. A process holds a lock
    on a file with its mark, which the kernel frees at its end; process ids would not do, since
    containers with ids of their own may share the memory.

    Returns:
        A name in `SHARED_MEMORY`; None where that is no folder that can be written to.
    """
    mark = f"diht_jax_{secrets.token_hex(8)}"
    lock = pathlib.Path(SHARED_MEMORY, f"{mark}.lock")
    try:
        _remove_stale_segments()
        # Held until the process ends. One that starts at this very moment may hold it for an
        # instant and remove the file: then no other run cleans up after this one.
        _held.append(lock_file(lock))
    except OSError:
        return None
    atexit.register(lambda: lock.unlink(missing_ok=True))
    return mark


def _remove_stale_segments() -> None:
    """Removes shared memory whose owner's lock is free, and the lock's file."""
    for path in pathlib.Path(SHARED_MEMORY).glob("diht_jax_*.lock"):
        with contextlib.suppress(OSError), lock_file(path, wait=False):  # another user's, or held
            _remove_segments(path.stem)
            path.unlink()


def _remove_segments(mark: str) -> None:
    """Removes shared memory with this mark."""
    for path in pathlib.Path(SHARED_MEMORY).glob(f"{mark}_*"):
        path.unlink(missing_ok=True)  # another worker may be faster


def _tracker_is_alive() -> bool:
    """Whether Python's resource tracker, which warns of segments that it does not find, runs."""
    is_alive = getattr(resource_tracker._resource_tracker, "_check_alive", None)
    return is_alive is None or is_alive()


def has_died(error: BaseException) -> bool:
    """Whether an error of grain's tells that a worker is gone."""
    return _WORKER_DIED.search(str(error)) is not None


def has_crashed(error: BaseException) -> bool:
    """Whether such a worker ended as by a fault in a library, not from outside."""
    found = _EXIT_CODE.search(str(error))
    return found is not None and int(found[1]) in _CRASHES


def describe_workers() -> str:
    """The workers of this process, and what the system knows of each."""
    found = [f"{child.pid} ({_state_of(child.pid)})" for child in _workers()]
    return f"worker processes: {', '.join(found)}" if found else "no worker process is running"


def kill_workers() -> None:
    """Ends the workers of this process at once, also those that are stopped."""
    children = _workers()
    for child in children:
        child.kill()
    for child in children:
        child.join(_KILL_SECS)


def _workers() -> list[multiprocessing.Process]:
    children = multiprocessing.active_children()
    return sorted(
        (child for child in children if child.name.startswith(_WORKER_NAME)), key=lambda c: c.pid
    )


def _state_of(pid: int) -> str:
    try:
        letter = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "state unknown"
    return _STATES.get(letter, letter)


def processor_secs() -> float:
    """Processor time that the workers of this process have taken; 0 where that is not known."""
    ticks = 0
    for child in _workers():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, or fewer by its container's quota."""
    affine = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    quota = _quota_cores()
    return cores if quota is None else min(cores, quota)


def _quota_cores() -> int | None:
    """The processor time that a container may take, in whole cores; None where it has no bound."""
    for names in _CPU_QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            text = " ".join((CGROUP / name).read_text() for name in names)
            quota, period = map(int, text.split())
            if quota > 0 and period > 0:  # without a bound, -1
                return math.ceil(quota / period)
    return None


def default_num_workers() -> int:
    """Of `config.data.num_workers=None`: one for each core that this process may use."""
    return min(usable_cores(), _MOST_BY_DEFAULT)


def warn_of_few_cores(num_workers: int) -> None:
    """Logs a warning where this process may use fewer cores than it has workers."""
    cores = usable_cores()
    if num_workers > cores:
        logging.warning(
            "config.data.num_workers=%d, but this process may use %d cores; lower it, or give the "
            "process more cores (Slurm: srun --cpus-per-task; Kubernetes: limits.cpu)",
            num_workers,
            cores,
        )
