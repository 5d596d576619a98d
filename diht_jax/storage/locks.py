"""Locks between processes: on a file, and on an output folder that may be in an object store.

Local locks are the operating system's, which end with their holder, also after `kill -9`. They hold
within a host, and between hosts on NFS. In a store, the lock is an object that is created only
where it is missing, and that its holder renews.
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

# A holder on another machine whose lock was not renewed while this process looked at it for this
# long is taken for dead. The clocks of machines are not compared.
EXPIRY_SECS = 300.0

_LEADER = ".leader.lock"  # in a local folder
_RENEWAL_SECS = 30.0
_POLL_SECS = 0.5
_NAME = re.compile(r"\.leader-(\d{4,})\.json")  # in a store
# File systems without locks; a process goes on there without one.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_now = time.monotonic  # tests put their own clock here
_sleep = time.sleep
# Tokens of the locks in stores that this process holds: any other of its own was left behind.
_held: set[str] = set()


class LockedError(OSError):
    """Another process, `holder`, holds the lock."""

    def __init__(self, path: str | os.PathLike[str], holder: str):
        super().__init__(f"{os.fspath(path)} is locked by {holder}")
        self.holder = holder


def lock_file(
    path: str | os.PathLike[str], *, wait: bool = True, names_holder: bool = True
) -> BinaryIO:
    """Opens a file, which is made where it is missing, and locks it until it is closed.

    The file names the holder, unless nobody will ask, and stays behind; only the lock on it counts.
    Where the file system has no locks, the process goes on without one.

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
        os.fsync(file.fileno())  # for other hosts, which otherwise see it when it is closed
    return file


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike[str], flag: str, name: str) -> Generator[None]:
    """Makes a folder where it is missing, and keeps other processes from working in it.

    A folder in an object store is not locked; that it can be written to is checked.

    Raises:
        ValueError: another process holds the lock, or nothing can be written there; names `flag`,
            such as "--workdir".
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
    """Writes a small file into a folder of a store and removes it.

    Raises:
        ValueError: the store takes no file: no such bucket, no permission, no writing. Names the
            flag `name`, such as "--output".
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
    """Holds an output folder, local or in a store, for the length of the block.

    Jobs of an array that end at the same time merge and describe their output one after the other.
    A process waits for the holder, and logs which one that is. A holder that has died is noticed at
    once; in a store, if it was on another machine, after `EXPIRY_SECS`.
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
        file.close()  # the holder before has deleted it
    with file:
        try:
            yield
        finally:
            files.remove(path)


@contextlib.contextmanager
def _lead_in_store(folder: str) -> Generator[None]:
    """The lock is an object `.leader-0000.json`.

    Whoever takes over from a dead holder creates the next number, so that only one can.
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
    finally:  # one that cannot be removed expires
        is_over.set()
        _held.discard(token)
        with writing:
            files.remove(path)


def _create_lock(folder: str, token: str) -> str:
    """The URL of the lock that this process holds, once the others have ended."""
    seen, since_secs, told = None, 0.0, ""  # the latest lock, since when it is so, the one named
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
        # Of two that come at the same time, at least one sees the other.
        if _lock_names(folder)[-1:] == [name]:
            for old in names:
                files.remove(files.join(folder, old))
            return path
        files.remove(path)
        _sleep(_POLL_SECS * random.random())


def _create(url: str, token: str) -> bool:
    """Writes a lock unless there is one; of several processes one succeeds."""
    system, name = open_system(url, use_listings_cache=False)
    content = _content(token)
    try:
        retry(lambda: system.pipe_file(name, content, mode="create"), url, "written")
    except FileExistsError:
        # A request whose answer was lost has succeeded all the same.
        return (files.read_object(url) or {}).get("token") == token
    except (TypeError, NotImplementedError):  # a store without conditional writes
        if files.exists(url):
            return False
        files.write_bytes(url, content)
    return True


def _lock_names(folder: str) -> list[str]:
    return sorted(filter(_NAME.fullmatch, files.list_names(folder)), key=lambda n: (len(n), n))


def _content(token: str) -> bytes:
    # Renewed means that the content is another one.
    facts = {"token": token, "machine": _machine(), "renewed": secrets.token_hex(4)}
    return json.dumps(_describe_process() | facts).encode()


def _has_ended(holder: dict[str, Any], since_secs: float) -> bool:
    """Returns whether a holder has died: known at once on this machine, else after a while.

    `since_secs` is when its lock became what it is, by the clock of this process.
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
    """The machine and the namespace in which a process number means the same process."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _describe_process() -> dict[str, Any]:
    """Host, number and time of this process, as its locks state them."""
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _name_holder(holder: dict[str, Any] | bytes) -> str:
    try:
        holder = json.loads(holder) if isinstance(holder, bytes) else holder
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "its lock file does not name it"
