"""Commands of the project in processes of their own, and locks that last as long as these do."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
import subprocess
import sys
from collections.abc import Iterator

_LOG_LINES = 40  # of a failed command, in the error
_held: list[int] = []


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Waits until no other process works under this lock.

    The commands that are started under it hold it too. So after `kill -9` of this process, the next
    one waits for the command that is still running.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held.append(file.fileno())
        try:
            yield
        finally:
            _held.remove(file.fileno())


def run_command(module: str, *arguments: str, log: pathlib.Path | None = None) -> None:
    """Runs one of the project's commands; it ends with this process's exception, if one comes.

    Args:
        module: as after `python -m`.
        *arguments: of the command.
        log: what the command prints is added to it; by default it is only kept for the error.

    Raises:
        RuntimeError: the command failed; with the end of what it printed.
    """
    with open(log, "a+") if log else contextlib.nullcontext() as file:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            stdout=file or subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            pass_fds=_held,
            check=False,
        )
        if done.returncode:
            if file:
                file.seek(0)
            printed = file.read() if file else done.stdout
            end = "\n".join(printed.splitlines()[-_LOG_LINES:])
            raise RuntimeError(f"{module} {' '.join(arguments)}: exit {done.returncode}\n{end}")
