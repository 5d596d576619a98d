"""One run at a time in a work directory.

The lock is the operating system's (`flock`), so it ends with the process
that holds it, however that ends: nothing stale is left after `kill -9`.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
from collections.abc import Iterator

from absl import logging
from etils import epath

LOCK_FILE = "run.lock"

# Where a file system knows no locks, a run goes on without.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def lock_directory(workdir: epath.Path) -> Iterator[None]:
    """Makes the work directory where it is missing, and holds its lock.

    The file names the holder: host, process and since when. It stays behind; what counts is the
    lock on it. Within one host, and between hosts on NFS, a second run is refused; object stores
    have no locks.

    Args:
        workdir: of the run.

    Raises:
        ValueError: another run holds the lock, or nothing can be written there.
    """
    path = workdir / LOCK_FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if "://" in os.fspath(workdir):
            path.write_text(_holder())
            file = None
        else:
            file = open(path, "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ValueError(
            f"--workdir={workdir} cannot be written: {error}. Expected a directory that can be "
            "made or written by this user, on a file system that is not read-only"
        ) from error
    if file is None:
        yield
        return
    with file:
        _take(file, workdir)
        yield


def _take(file, workdir: epath.Path) -> None:
    # Not at the top: only Unix has it.
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise ValueError(
            f"another run works in {workdir}: {_describe(file.read())}. Wait for its end or stop "
            "it, or take another --workdir"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.warning(
            "%s: this file system has no locks (%s); nothing prevents a second run here",
            workdir,
            error,
        )
    with contextlib.suppress(OSError):  # a full disk must not prevent a run from going on
        file.truncate(0)
        file.write(_holder())
        file.flush()
        os.fsync(file.fileno())  # for other hosts, which otherwise see it when it is closed


def _holder() -> str:
    return json.dumps(
        {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )


def _describe(text: str) -> str:
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "its lock file does not name it"
