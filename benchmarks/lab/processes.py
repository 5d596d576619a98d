"""Runs the project's commands as subprocesses, with locks that the subprocesses also hold."""

from __future__ import annotations

import contextlib
import fcntl
import pathlib
import subprocess
import sys
from collections.abc import Iterator

_LOG_LINES = 40  # last lines of a failed command's output in the error
_held: list[int] = []


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """Holds a lock file, after waiting for other processes to release it.

    Commands that are started under the lock hold it too. After `kill -9` of this process, the next
    process therefore waits for the command that is still running.
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
    """Runs one of the project's commands; an exception in this process ends the command.

    Args:
        module: module of the command, as in `python -m`.
        *arguments: arguments of the command.
        log: file to append the output to. By default, the output only appears in the error.

    Raises:
        RuntimeError: the command failed; the message contains the end of its output.
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
