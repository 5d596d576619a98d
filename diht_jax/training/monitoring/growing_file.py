"""Files that grow by records, on a disk or in an object store."""

from __future__ import annotations

import contextlib
import os

from absl import logging
from etils import epath

from diht_jax.storage.files import write_bytes
from diht_jax.storage.stores import is_remote


class GrowingFile:
    """Appends to a file. A kill leaves whole records, and what cannot be written is kept.

    Nothing can be appended to an object of a store: it is written anew whenever it grows.
    """

    def __init__(self, path: epath.Path, data: bytes):
        """Writes the file at once.

        Raises:
            Exception: it cannot be written; which one depends on the storage.
        """
        self._path, self._data, self._waiting = path, data, b""
        self._is_remote = is_remote(os.fspath(path))
        if self._is_remote:
            path.write_bytes(data)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(os.fspath(path), data)

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
