"""Files of a run that change while it goes on, on a disk or in an object store.

Nothing here waits for a store that fails: the run goes on, and a later call tries again.
"""

from __future__ import annotations

import contextlib
import os

from absl import logging
from etils import epath

from diht_jax.storage.files import write_bytes
from diht_jax.storage.stores import is_remote


def replace_file(path: epath.Path, data: bytes) -> None:
    """Writes a file that appears whole or not at all.

    Raises:
        Exception: it cannot be written; which one depends on the storage.
    """
    if is_remote(os.fspath(path)):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)


class GrowingFile:
    """Appends to a file. A kill leaves whole records, and what cannot be written is kept.

    Nothing can be appended to an object of a store: it is written anew whenever it grows.
    """

    def __init__(self, path: epath.Path, data: bytes):
        """Writes the file at once; errors are those of `replace_file`."""
        self._path, self._data, self._waiting = path, data, b""
        self._is_remote = is_remote(os.fspath(path))
        replace_file(path, data)

    def append(self, data: bytes) -> None:
        """Adds to the end, after what was kept; a warning where that cannot be written now."""
        self._waiting += data
        try:
            if self._is_remote:
                self._path.write_bytes(self._data + self._waiting)
            else:
                with open(self._path, "r+b") as file:
                    file.seek(len(self._data))
                    file.truncate()  # a part of what could not be written before
                    file.write(self._waiting)
            self._data, self._waiting = self._data + self._waiting, b""
        except Exception as error:  # few errors of stores are an OSError
            logging.warning(
                "%s: a line is kept for later, it cannot be written: %s",
                self._path,
                str(error) or type(error).__name__,
            )

    def sync(self) -> None:
        """Writes what was kept, and makes the file outlive a crash of the machine."""
        if self._waiting:
            self.append(b"")
        if not self._is_remote:
            with contextlib.suppress(OSError), open(self._path, "rb") as file:
                os.fsync(file.fileno())
