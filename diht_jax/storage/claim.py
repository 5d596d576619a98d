"""One process at a time ends a job: of an array that is done, one merges and writes the output.

A claim is a file in the folder, `.claim-0000.json`, that is created only where it is missing, which
local disks, NFS and object stores all can do at once for everybody. Its holder renews it; when the
holder has died, the next number is created in the same way, so that only one can take over. While
the holder looks at what is there, others wait; once it writes, they need not.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from absl import logging

from diht_jax.storage import files
from diht_jax.storage.retries import retry
from diht_jax.storage.stores import is_remote, open_system

# A holder on another machine that has not renewed its claim for so long is taken for dead.
EXPIRY_SECS = 300.0

_RENEWAL_SECS = 30.0
_POLL_SECS = 0.5
_PATIENCE = 10  # polls for the contents of a file that was just created
_NAME = re.compile(r"\.claim-(\d{4,})\.json")
_TEMPORARY = re.compile(r"\.\.claim-.*\.tmp")

_now = time.time  # tests put their own clock here; seconds since 1970, as other machines count
_sleep = time.sleep
# Of the claims that this process holds: one of its own that is not among them was left behind.
_held: set[str] = set()


class Claim:
    """The claim on a folder that this process holds."""

    def __init__(self, path: str):
        """Not created yet."""
        self.path = path
        self._token = secrets.token_hex(8)
        self._is_writing = False
        self._since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(_now()))
        self._lock = threading.Lock()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def create(self) -> bool:
        """Creates the file; False where somebody else has done so."""
        _held.add(self._token)
        if not _create(self.path, self._content(), self._token):
            _held.discard(self._token)
            return False
        self._thread.start()
        return True

    def announce_writing(self) -> None:
        """From now on others need not wait for this process."""
        with self._lock:
            self._is_writing = True
            files.write_bytes(self.path, self._content())

    def release(self) -> None:
        """Removes the file; one that cannot be removed counts no more, once it is not renewed."""
        self._is_over.set()
        _held.discard(self._token)
        with self._lock:
            files.remove(self.path)

    def _renew(self) -> None:
        while not self._is_over.wait(_RENEWAL_SECS):
            with self._lock:
                if self._is_over.is_set():
                    return
                try:
                    files.write_bytes(self.path, self._content())
                except OSError as error:
                    logging.warning("%s could not be renewed: %s", self.path, error)

    def _content(self) -> bytes:
        holder = {
            "token": self._token,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "since": self._since,
            "renewed": _now(),
            "writing": self._is_writing,
        }
        return (json.dumps(holder) + "\n").encode()


@contextlib.contextmanager
def take(folder: str) -> Iterator[Claim | None]:
    """Holds the claim on a folder for the length of the block.

    Args:
        folder: that exists, or a URL.

    Yields:
        None, and a line is printed, where another process writes there already.
    """
    claim = _wait_for_turn(folder)
    if claim is None:
        yield None
        return
    try:
        yield claim
    finally:
        claim.release()


def _wait_for_turn(folder: str) -> Claim | None:
    while True:
        names = _names(folder)
        for name in names:
            holder = _read_holder(files.join(folder, name))
            if holder is None or _has_ended(holder):
                continue
            if holder["writing"]:
                print(f"{folder}: {_describe(holder)} writes the output, since all is done")
                return None
            _sleep(_POLL_SECS)
            break
        else:
            number = int(_NAME.fullmatch(names[-1])[1]) + 1 if names else 0
            claim = Claim(files.join(folder, f".claim-{number:04d}.json"))
            if claim.create():
                if _is_alone(claim, folder):
                    _remove_ended(names, folder)
                    return claim
                claim.release()
                _sleep(_POLL_SECS * random.random())


def _is_alone(claim: Claim, folder: str) -> bool:
    """Whether no other claim is held, now that this one is there.

    Of two processes that create theirs at the same time at least one sees the other.
    """
    others = [name for name in _names(folder) if name != os.path.basename(claim.path)]
    holders = (_read_holder(files.join(folder, name)) for name in others)
    return all(holder is None or _has_ended(holder) for holder in holders)


def _remove_ended(names: list[str], folder: str) -> None:
    """Removes the claims of processes that have died, and what they left half-written."""
    left = () if is_remote(folder) else files.list_names(folder)
    for name in (*names, *filter(_TEMPORARY.fullmatch, left)):
        files.remove(files.join(folder, name))


def _read_holder(path: str) -> dict[str, Any] | None:
    """Who holds a claim; None where it is gone, or whoever created it has died before it wrote."""
    for _ in range(_PATIENCE):
        holder = files.read_object(path)
        if holder is not None or not files.exists(path):
            return holder
        _sleep(_POLL_SECS)
    return None


def _names(folder: str) -> list[str]:
    return sorted(filter(_NAME.fullmatch, files.list_names(folder)), key=lambda n: (len(n), n))


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether a holder has died: at once where it ran on this machine, else after a while."""
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
    """Where a process number means the same process."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            boot = file.read().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']} (since {holder['since']})"


def _create(path: str, content: bytes, token: str) -> bool:
    """Writes a file unless there is one; of several processes one succeeds."""
    try:
        if is_remote(path):
            system, name = open_system(path, use_listings_cache=False)
            try:
                retry(lambda: system.pipe_file(name, content, mode="create"), path, "written")
            except (TypeError, NotImplementedError):  # a store that cannot do it at once
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
