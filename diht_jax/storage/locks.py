"""Locks between processes: on a file, and on an output folder that may be in an object store.

`lock_file` takes the operating system's lock, which ends with its holder, also after `kill -9`. It
holds within a host, and between hosts on NFS. `leader_lock` needs nothing but files that are
created only where they are missing, which disks, network file systems and object stores all offer.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from absl import logging

from diht_jax.storage import files
from diht_jax.storage.retries import retry
from diht_jax.storage.stores import is_remote, open_system

# A holder on another machine that has not renewed its lock for this long is taken for dead.
EXPIRY_SECS = 300.0

_RENEWAL_SECS = 30.0
_POLL_SECS = 0.5
_CONTENT_POLLS = 10  # looks at a lock that has just been created and is empty
_NAME = re.compile(r"\.leader-(\d{4,})\.json")
# File systems without locks; a process goes on there without one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_now = time.time  # tests put their own clock here; seconds since 1970, as other machines count
_sleep = time.sleep
# Tokens of the leader locks that this process holds: any other of its own was left behind.
_held: set[str] = set()


class LockedError(OSError):
    """Another process holds the lock.

    Attributes:
        holder: which one, for messages.
    """

    def __init__(self, path: str | os.PathLike[str], holder: str):
        super().__init__(f"{os.fspath(path)} is locked by {holder}")
        self.holder = holder


def lock_file(path: str | os.PathLike[str], *, wait: bool = True) -> BinaryIO:
    """Opens a file, which is made where it is missing, and locks it until it is closed.

    The file names the holder and stays behind; only the lock on it counts. Where the file system
    has no locks, the process goes on without one.

    Args:
        path: of a local file.
        wait: wait for another holder to end.

    Raises:
        LockedError: another process holds the lock, unless `wait`.
        OSError: the file cannot be written.
    """
    file = open(path, "a+b")  # noqa: SIM115 - the caller closes it
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        with file:
            file.seek(0)
            raise LockedError(path, _describe_holder(file.read())) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise
        logging.warning("%s: this file system has no locks (%s); going on without", path, error)
    with contextlib.suppress(OSError):  # a full disk does not prevent a lock
        file.truncate(0)
        file.write(json.dumps(_describe_process()).encode())
        file.flush()
        os.fsync(file.fileno())  # for other hosts, which otherwise see it when it is closed
    return file


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str], flag: str, name: str) -> Iterator[None]:
    """Makes a folder where it is missing, and keeps other processes from working in it.

    A folder in an object store is not locked; that it can be written to is checked.

    Args:
        folder: path or URL.
        flag: that names the folder, such as "--workdir", for messages.
        name: of the lock's file in it.

    Raises:
        ValueError: another process holds the lock, or nothing can be written there.
    """
    folder = os.fspath(folder)
    path = files.join(folder, name)
    try:
        files.make_folder(folder)
        if is_remote(folder):
            files.write_bytes(path, json.dumps(_describe_process()).encode())
            lock = contextlib.nullcontext()
        else:
            lock = lock_file(path, wait=False)
    except LockedError as error:
        raise ValueError(
            f"another run works in {folder}: {error.holder}. Wait for its end or stop it, or take "
            f"another {flag}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{flag}={folder} cannot be written: {error}. Expected a directory that can be made or "
            "written by this user, on a file system that is not read-only"
        ) from error
    with lock:
        yield


@contextlib.contextmanager
def leader_lock(folder: str) -> Iterator[None]:
    """Holds an output folder, local or in a store, for the length of the block.

    Jobs of an array that end at the same time merge and describe their output one after the other.
    A process waits for the holder. A holder that has died is noticed at once on its own machine,
    and after `EXPIRY_SECS` from others.

    The lock is a file `.leader-0000.json` that is created only where it is missing, and that its
    holder renews. Whoever takes over from a dead holder creates the next number, so that only one
    can.

    Args:
        folder: that exists, or a URL.
    """
    lock = _wait_for_turn(folder)
    try:
        yield
    finally:
        lock.release()


class _LeaderLock:
    """The lock on a folder that this process holds."""

    def __init__(self, path: str):
        self.path = path
        self._holder = _describe_process() | {
            "token": secrets.token_hex(8),
            "machine": _machine(),
        }
        self._writing = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def create(self) -> bool:
        """Creates the file; False where another process has done so."""
        token = self._holder["token"]
        _held.add(token)
        if not _create(self.path, self._content(), token):
            _held.discard(token)
            return False
        self._thread.start()
        return True

    def release(self) -> None:
        """Removes the file; one that cannot be removed expires, since it is no longer renewed."""
        self._is_over.set()
        _held.discard(self._holder["token"])
        with self._writing:
            files.remove(self.path)

    def _renew(self) -> None:
        while not self._is_over.wait(_RENEWAL_SECS):
            with self._writing:
                if self._is_over.is_set():
                    return
                try:
                    files.write_bytes(self.path, self._content())
                except OSError as error:
                    logging.warning("%s could not be renewed: %s", self.path, error)

    def _content(self) -> bytes:
        return json.dumps(self._holder | {"renewed": _now()}).encode()


def _wait_for_turn(folder: str) -> _LeaderLock:
    has_told = False
    while True:
        names = _leader_names(folder)
        holders = (_read_leader(files.join(folder, name)) for name in names)
        active = next((holder for holder in holders if not _has_ended(holder)), None)
        if active is not None:
            if not has_told:
                logging.info("%s: waiting for %s", folder, _name_holder(active))
                has_told = True
            _sleep(_POLL_SECS)
            continue
        number = int(_NAME.fullmatch(names[-1])[1]) + 1 if names else 0
        lock = _LeaderLock(files.join(folder, f".leader-{number:04d}.json"))
        if not lock.create():
            continue
        if _is_alone(lock, folder):
            for name in names:
                files.remove(files.join(folder, name))
            return lock
        lock.release()
        _sleep(_POLL_SECS * random.random())


def _is_alone(lock: _LeaderLock, folder: str) -> bool:
    """Returns whether no other lock is held next to this one.

    Of two processes that create theirs at the same time at least one sees the other.
    """
    others = [name for name in _leader_names(folder) if not lock.path.endswith(name)]
    return all(_has_ended(_read_leader(files.join(folder, name))) for name in others)


def _read_leader(path: str) -> dict[str, Any] | None:
    """The holder of a lock; None where it is gone, or its creator died before it wrote."""
    for _ in range(_CONTENT_POLLS):
        holder = files.read_object(path)
        if holder is not None or not files.exists(path):
            return holder
        _sleep(_POLL_SECS)
    return None


def _leader_names(folder: str) -> list[str]:
    return sorted(filter(_NAME.fullmatch, files.list_names(folder)), key=lambda n: (len(n), n))


def _has_ended(holder: dict[str, Any] | None) -> bool:
    """Returns whether a holder has died: known at once on this machine, else after a while."""
    if holder is None:
        return True
    if holder["machine"] == _machine():
        if holder["pid"] == os.getpid():
            return holder["token"] not in _held
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return _now() - holder["renewed"] > EXPIRY_SECS


def _machine() -> str:
    """The machine and the namespace in which a process number means the same process."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _create(path: str, content: bytes, token: str) -> bool:
    """Writes a file unless there is one; of several processes one succeeds."""
    try:
        if is_remote(path):
            system, name = open_system(path, use_listings_cache=False)
            try:
                retry(lambda: system.pipe_file(name, content, mode="create"), path, "written")
            except (TypeError, NotImplementedError):  # a store without conditional writes
                if files.exists(path):
                    return False
                files.write_bytes(path, content)
        else:
            with open(path, "xb") as file:
                file.write(content)
    except FileExistsError:
        # A request whose answer was lost has succeeded all the same.
        return (files.read_object(path) or {}).get("token") == token
    return True


def _describe_process() -> dict[str, Any]:
    """Host, number and time of this process, as its locks state them."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _describe_holder(content: bytes) -> str:
    try:
        return _name_holder(json.loads(content))
    except (ValueError, KeyError, TypeError):
        return "its lock file does not name it"


def _name_holder(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
