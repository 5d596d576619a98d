"""Decoding worker processes: their number, memory, state and cleanup.

grain starts the workers by `spawn` and passes batches in segments of POSIX shared memory. Python's
resource tracker, a separate process, removes remaining segments when the parent and all workers
have ended. A worker that outlives its parent therefore keeps all of them, and the tracker may be
killed too, for example at the end of a cgroup. Therefore the names of a run's segments start with a
mark, and the next run on this machine removes those of ended runs. Folders of blocks from an object
store (`blocks.py`) have a mark as well, and are also removed by the workers.
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
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from multiprocessing import process, shared_memory
from typing import TypeVar

from diht_jax.storage.locks import LockedError, lock_file

SHARED_MEMORY = "/dev/shm"
_Result = TypeVar("_Result")

# Names of grain's workers, and grain's messages about dead ones.
_WORKER_NAME = "grain-process-prefetch"
_WORKER_DIED = re.compile(r"[Ww]orker process.*(terminated|died|exit)")
_EXIT_CODE = re.compile(r"exit code -(\d+)")
# Signals of a process that crashes in a library.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for a disk or the network",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "Z": "ended",
}
# Largest default number of workers: each needs memory, and 64 feed eight of the fastest GPUs.
_MOST_BY_DEFAULT = 64
# The cgroup, as seen from inside a container, and the memory of the machine.
CGROUP, _MEMINFO = pathlib.Path("/sys/fs/cgroup"), pathlib.Path("/proc/meminfo")
# CPU quota and its period, both in microseconds; cgroup version 2 and 1.
_CPU_QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
# Limit, usage and statistics of memory; cgroup version 2 and 1.
_MEMORY_LIMITS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
_POLL_SECS = 1.0  # interval at which a worker checks its parent
_KILL_SECS = 5.0  # timeout for a killed process
_REMOVALS = 100  # attempts to delete a folder; concurrent writes make an attempt fail


def run_in_thread(function: Callable[[], _Result], name: str) -> futures.Future[_Result]:
    """Calls a function in a daemon thread, which does not delay the end of the process."""
    future: futures.Future[_Result] = futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def start_worker(
    parent: int, mark: str | None, *_: int, folders: Sequence[pathlib.Path] = ()
) -> None:
    """Marks this process's shared memory, and ends the process soon after its parent has ended.

    A thread polls the parent. The kernel's signal (PR_SET_PDEATHSIG) would be sent when the thread
    that started this process ends, and grain starts workers in short-lived threads.

    Args:
        parent: process id of the process that started this one.
        mark: the parent's `claim_mark` of shared memory.
        folders: removed when the parent has ended.
    """
    if mark is not None:
        # Python has no public way to name the segments that other code creates.
        vars(shared_memory)["_make_filename"] = lambda: f"/{mark}_{secrets.token_hex(8)}"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECS)
        for folder in folders:
            remove_folder(folder)
        # A normal exit would wait for the parent to empty the queues.
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


@functools.cache
def claim_mark(folder: str) -> str | None:
    """Returns the name prefix of all files of this process and its workers in a folder.

    Returns None if the folder does not exist or is not writable. The first call also removes files
    of ended processes. A process holds a lock on a file with its mark, which the kernel releases
    when the process ends. Process ids would not work, because containers with different PID
    namespaces may share the folder.
    """
    mark = f"diht_jax_{secrets.token_hex(8)}"
    path = pathlib.Path(folder, f"{mark}.lock")
    # Other processes remove files without a lock, so this one is renamed after it is locked.
    unnamed = path.with_name(f".{path.name}")
    try:
        lock = lock_file(unnamed, wait=False)
        unnamed.rename(path)
        # Held until the process ends.
        atexit.register(lambda: (path.unlink(missing_ok=True), lock.close()))
        with contextlib.suppress(LockedError):
            lock_file(path, wait=False).close()
            return mark  # the file system has no locks
        for other in pathlib.Path(folder).glob("diht_jax_*.lock"):
            with contextlib.suppress(OSError), lock_file(other, wait=False):
                for left in pathlib.Path(folder).glob(f"{other.stem}_*"):
                    if left.is_dir():
                        remove_folder(left)
                    else:
                        left.unlink(missing_ok=True)
                other.unlink()
    except OSError:
        return None
    return mark


def remove_folder(folder: pathlib.Path) -> None:
    """Deletes a folder, even while other processes write to it."""
    for _ in range(_REMOVALS):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return


def has_died(error: BaseException) -> bool:
    """Returns whether an error is grain's report of a dead worker."""
    return _WORKER_DIED.search(str(error)) is not None


def has_crashed(error: BaseException) -> bool:
    """Returns whether the dead worker of an error crashed in a library, rather than was killed."""
    found = _EXIT_CODE.search(str(error))
    return found is not None and int(found[1]) in _CRASHES


def describe_workers() -> str:
    """Describes the workers of this process and their states in the operating system."""
    found = []
    for child in _workers():
        state = "state unknown"
        with contextlib.suppress(OSError):
            letter = _read_stat(child)[0]
            state = _STATES.get(letter, letter)
        found.append(f"{child.pid} ({state})")
    return f"worker processes: {', '.join(found)}" if found else "no worker process is running"


def kill_workers() -> None:
    """Kills the workers of this process, including those that are stopped."""
    children = _workers()
    for child in children:
        child.kill()
    for child in children:
        child.join(_KILL_SECS)


def _workers() -> list[process.BaseProcess]:
    children = multiprocessing.active_children()
    return sorted(
        (child for child in children if child.name.startswith(_WORKER_NAME)),
        key=lambda c: c.pid or 0,
    )


def _read_stat(child: process.BaseProcess) -> list[str]:
    """Returns the fields of `/proc/PID/stat` after the name: state, parent, ..."""
    return pathlib.Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()


def processor_secs() -> float:
    """Returns the CPU seconds of the workers of this process; 0 if unknown."""
    ticks = 0
    for child in _workers():
        with contextlib.suppress(OSError, ValueError, IndexError):
            ticks += sum(map(int, _read_stat(child)[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def usable_cores() -> int:
    """Returns the number of cores that this process may use, by affinity and container quota."""
    affine = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    for names in _CPU_QUOTAS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            texts = [(CGROUP / name).read_text() for name in names]
            quota, period = map(int, " ".join(texts).split())
            if quota > 0 and period > 0:  # -1 is unlimited
                return min(cores, math.ceil(quota / period))
    return cores


def default_num_workers() -> int:
    """Returns the workers for `config.data.num_workers=None`: one per usable core, at most 64."""
    return min(usable_cores(), _MOST_BY_DEFAULT)


def free_shared_memory() -> int | None:
    """Returns the free bytes of shared memory, or None if unknown."""
    try:
        stats = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize


def available_memory() -> int | None:
    """Returns the bytes that machine and container can still provide, or None if unknown."""
    found = []
    for limit, use, statistics in _MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
            left = int((CGROUP / limit).read_text()) - int((CGROUP / use).read_text())
            fields = _read_fields(CGROUP / statistics)
            # The page cache is reclaimable although it counts as used; shared memory is not.
            cached = fields.get("file", fields.get("cache", 0)) - fields.get("shmem", 0)
            found.append(max(0, left + max(0, cached)))
    with contextlib.suppress(OSError, KeyError):
        found.append(1024 * _read_fields(_MEMINFO)["MemAvailable:"])
    return min(found, default=None)


def _read_fields(path: pathlib.Path) -> dict[str, int]:
    """Reads the lines "name number ..." of a file."""
    fields = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            fields[words[0]] = int(words[1])
    return fields


def describe_bytes(size: float) -> str:
    """Formats a size, such as "67.1 MB" or "12.3 GB"."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
