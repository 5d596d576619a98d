"""Locks between processes, on a file or on an output folder that may be in an object store.

Local locks are locks of the operating system, which end with the process, even after `kill -9`.
They work within a host, and between hosts on NFS. In a store, the lock is an object that is created
only if it is missing, and that its holder renews.
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
from collections.abc import Generator
from typing import Any, BinaryIO

from absl import logging

from diht_jax.storage import files
from diht_jax.storage.stores import is_remote, open_system, retry

# A holder on another machine counts as dead if its lock was not renewed for this long while this
# process watched it. Clocks of different machines are not compared.
EXPIRY_SECS = 300.0

_LEADER = ".leader.lock"  # in a local folder
_RENEWAL_SECS = 30.0
_POLL_SECS = 0.5
_NAME = re.compile(r"\.leader-(\d{4,})\.json")  # in a store
# Errors of file systems without locks, where a process continues without one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_now = time.monotonic  # replaced in tests
_sleep = time.sleep
# Tokens of the store locks that this process holds; its other tokens are stale.
_held: set[str] = set()


class LockedError(OSError):
    """Raised if another process, `holder`, holds the lock."""

    def __init__(self, path: str | os.PathLike[str], holder: str):
        super().__init__(f"{os.fspath(path)} is locked by {holder}")
        self.holder = holder


def lock_file(
    path: str | os.PathLike[str], *, wait: bool = True, names_holder: bool = True
) -> BinaryIO:
    """Opens a file, which is created if missing, and locks it until it is closed.

    With `names_holder`, the file names this process. It stays behind, since only the lock counts.
    On a file system without locks, the process continues without one.

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
            raise LockedError(path, _name_holder(file.read())) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            file.close()
            raise
        logging.warning("%s: this file system has no locks (%s); going on without", path, error)
    if not names_holder:
        return file
    with contextlib.suppress(OSError):  # a full disk does not prevent a lock
        file.truncate(0)
        file.write(json.dumps(_describe_process()).encode())
        file.flush()
        os.fsync(file.fileno())  # other hosts would otherwise see it only on close
    return file


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str], flag: str, name: str) -> Generator[None]:
    """Context manager that creates a folder if missing and locks it against other processes.

    A folder in an object store is only checked for write access, not locked.

    Raises:
        ValueError: another process holds the lock, or the folder cannot be written. The message
            names `flag`, such as "--workdir".
    """
    folder = os.fspath(folder)
    lock = contextlib.nullcontext()
    try:
        files.make_folder(folder)
        if is_remote(folder):
            check_writable(folder, flag)
        else:
            lock = lock_file(os.path.join(folder, name), wait=False)
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


def check_writable(folder: str, name: str) -> None:
    """Checks that a store's folder is writable, by writing and removing a small file.

    Raises:
        ValueError: the store refuses the file: the bucket is missing or read-only, or permission is
            lacking. The message names the flag `name`, such as "--output".
    """
    probe = files.join(folder, ".probe")
    try:
        files.write_bytes(probe, b"")
        files.remove(probe)
    except ValueError:
        raise
    except Exception as error:  # a missing bucket, a store that is read only, no credentials
        raise ValueError(
            f"{name}='{folder}': nothing can be written there "
            f"({str(error) or type(error).__name__}); expected a local folder, or one in a bucket "
            "that exists and may be written to"
        ) from error


def leader_lock(folder: str) -> contextlib.AbstractContextManager[None]:
    """Returns a context manager that holds the lock of an output folder, local or in a store.

    Jobs of an array that end together merge and describe their output one after the other. A
    waiting process logs who the holder is. A dead holder is noticed at once, except in a store:
    there, one on another machine is noticed after `EXPIRY_SECS`.
    """
    return _lead_in_store(folder) if is_remote(folder) else _lead_locally(folder)


@contextlib.contextmanager
def _lead_locally(folder: str) -> Generator[None]:
    path = os.path.join(folder, _LEADER)
    while True:
        try:
            file = lock_file(path, wait=False)
        except LockedError as error:
            logging.warning("%s: waiting for %s, which works there", folder, error.holder)
            file = lock_file(path)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # deleted by the previous holder
    with file:
        try:
            yield
        finally:
            files.remove(path)


@contextlib.contextmanager
def _lead_in_store(folder: str) -> Generator[None]:
    """Holds the lock in a store, which is an object such as `.leader-0000.json`.

    A process that takes over from a dead holder creates the next number, so only one succeeds.
    """
    token, is_over, writing = secrets.token_hex(8), threading.Event(), threading.Lock()
    _held.add(token)
    path = _create_lock(folder, token)

    def renew() -> None:
        while not is_over.wait(_RENEWAL_SECS):
            with writing:
                if is_over.is_set():
                    return
                try:
                    files.write_bytes(path, _content(token))
                except OSError as error:
                    logging.warning("%s could not be renewed: %s", path, error)

    threading.Thread(target=renew, daemon=True).start()
    try:
        yield
    finally:  # a lock that cannot be removed expires
        is_over.set()
        _held.discard(token)
        with writing:
            files.remove(path)


def _create_lock(folder: str, token: str) -> str:
    """Waits for the other holders, creates the lock of this process, and returns its URL."""
    seen, since_secs, told = None, 0.0, ""  # latest lock, time of its change, lock logged
    while True:
        names = _lock_names(folder)
        latest = names[-1] if names else ""
        holder = files.read_object(files.join(folder, latest)) if latest else None
        if (latest, holder) != seen:
            seen, since_secs = (latest, holder), _now()
        if holder is not None and not _has_ended(holder, since_secs):
            if told != latest:
                told = latest
                logging.warning(
                    "%s: waiting for %s, until it ends or has not renewed %s for %.0f s",
                    folder,
                    _name_holder(holder),
                    latest,
                    EXPIRY_SECS,
                )
            _sleep(_POLL_SECS)
            continue
        number = _NAME.fullmatch(latest)
        name = f".leader-{int(number[1]) + 1 if number else 0:04d}.json"
        path = files.join(folder, name)
        if not _create(path, token):
            continue
        # Of two processes that arrive together, at least one sees the other.
        if _lock_names(folder)[-1:] == [name]:
            for old in names:
                files.remove(files.join(folder, old))
            return path
        files.remove(path)
        _sleep(_POLL_SECS * random.random())


def _create(url: str, token: str) -> bool:
    """Writes a lock unless there is one; of several processes, one succeeds."""
    system, name = open_system(url, use_listings_cache=False)
    content = _content(token)
    try:
        retry(lambda: system.pipe_file(name, content, mode="create"), url, "written")
    except FileExistsError:
        # A request may have succeeded although its response was lost.
        return (files.read_object(url) or {}).get("token") == token
    except (TypeError, NotImplementedError):  # a store without conditional writes
        if files.exists(url):
            return False
        files.write_bytes(url, content)
    return True


def _lock_names(folder: str) -> list[str]:
    return sorted(filter(_NAME.fullmatch, files.list_names(folder)), key=lambda n: (len(n), n))


def _content(token: str) -> bytes:
    # A renewal is recognised by changed content.
    facts = {"token": token, "machine": _machine(), "renewed": secrets.token_hex(4)}
    return json.dumps(_describe_process() | facts).encode()


def _has_ended(holder: dict[str, Any], since_secs: float) -> bool:
    """Returns whether a holder has died: known at once on this machine, else after `EXPIRY_SECS`.

    `since_secs` is the time of the last change of its lock, by the clock of this process.
    """
    if holder.get("machine") == _machine():
        if holder["pid"] == os.getpid():
            return holder["token"] not in _held
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return _now() - since_secs > EXPIRY_SECS


def _machine() -> str:
    """Returns an id of the machine and of the namespace of its process numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _describe_process() -> dict[str, Any]:
    """Returns the host and number of this process and the current time, as its locks state them."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _name_holder(holder: dict[str, Any] | bytes) -> str:
    try:
        holder = json.loads(holder) if isinstance(holder, bytes) else holder
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "its lock file does not name it"
