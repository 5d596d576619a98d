"""Detects what a run leaves behind after it ends: processes and shared memory."""

from __future__ import annotations

import contextlib
import pathlib

from tests.waiting import wait_until

# Prefixes of Python's segments, of this project's segments, and of Python's semaphores.
_PREFIXES = ("psm_", "diht_jax_", "sem.mp-")


def processes_of(session: int) -> dict[int, str]:
    """Returns id -> memory maps of the live processes of a session; session 0 means all."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if folder.name.isdigit() and state != "Z" and session in (0, int(its_session)):
                found[int(folder.name)] = (folder / "maps").read_text()
    return found


def shared_memory() -> set[str]:
    """Names of the shared-memory segments and semaphores of all Python processes here."""
    names = {path.name for path in pathlib.Path("/dev/shm").iterdir()}
    # The lock that a killed run leaves is empty; the next run removes it.
    return {n for n in names if n.startswith(_PREFIXES) and not n.endswith(".lock")}


def wait_until_nothing_is_left(session: int, before: set[str]) -> None:
    """Waits until the session has no process and each new segment is mapped by some process.

    Args:
            session: Session id of the run.
            before: Names of the segments that existed before the run.
    """
    wait_until(lambda: not processes_of(session))

    def none_is_left() -> bool:
        new = shared_memory() - before
        maps = "".join(processes_of(0).values()) if new else ""  # from other runs as well
        return all(name in maps for name in new & shared_memory())

    wait_until(none_is_left)
