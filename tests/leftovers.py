"""What a run leaves behind when it ends: processes of its session, and shared memory."""

from __future__ import annotations

import contextlib
import pathlib

from tests.waiting import wait_until

# Of Python's segments, of ours, and of Python's semaphores.
_PREFIXES = ("psm_", "diht_jax_", "sem.mp-")


def processes_of(session: int) -> dict[int, str]:
    """The processes of a session that have not ended, by id, with their memory maps."""
    found = {}
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            state, _, _, its_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if folder.name.isdigit() and state != "Z" and session in (0, int(its_session)):
                found[int(folder.name)] = (folder / "maps").read_text()
    return found


def shared_memory() -> set[str]:
    """Names of segments and semaphores that Python's processes here have, ours or not."""
    names = {path.name for path in pathlib.Path("/dev/shm").iterdir()}
    # A killed run's lock is empty, and goes with the next run.
    return {n for n in names if n.startswith(_PREFIXES) and not n.endswith(".lock")}


def wait_until_nothing_is_left(session: int, before: set[str]) -> None:
    """Returns once no process of a session is there, nor a segment that nobody has any more.

    Args:
        session: of the run.
        before: segments that were there before it.
    """
    wait_until(lambda: not processes_of(session))

    def none_is_left() -> bool:
        new = shared_memory() - before
        maps = "".join(processes_of(0).values()) if new else ""  # others may run here as well
        return all(name in maps for name in new & shared_memory())

    wait_until(none_is_left)
