"""A file that grows by whole records, on disk or in an object store; a failed write is made up."""

from __future__ import annotations

import contextlib
import errno
import os

from absl import logging
from etils import epath

from diht_jax.storage.files import write_bytes
from diht_jax.storage.stores import is_remote


class GrowingFile:
    """Appends to a file. A kill leaves whole records, and what cannot be written is kept.

    Nothing can be appended to an object of a store: it is written anew whenever it grows.
    """

    def __init__(self, path: epath.Path, data: bytes = b""):
        """Writes the file at once.

        Args:
            path: of the file.
            data: its contents so far.

        Raises:
            Exception: it cannot be written; which one depends on the storage.
        """
        self._path, self._waiting = path, b""
        self._whole = data if is_remote(os.fspath(path)) else None
        if self._whole is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(os.fspath(path), data)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close
        else:
            path.write_bytes(data)

    def append(self, data: bytes) -> None:
        """Adds to the end, after what was kept; a warning where that cannot be written now."""
        self._waiting += data
        self._write()

    def sync(self) -> None:
        """Writes what was kept, and makes the file outlive a crash of the machine."""
        self._write()
        if self._whole is None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes what was kept; a warning where that cannot be written now either."""
        self._write()
        if self._waiting:
            logging.warning("%s lacks its last lines, they could not be written", self._path)
        if self._whole is None:
            self._file.close()

    def _write(self) -> None:
        if not self._waiting:
            return
        try:
            if self._whole is None:
                self._append_to_disk()
            else:
                self._path.write_bytes(self._whole + self._waiting)
                self._whole += self._waiting
            self._waiting = b""
        except Exception as error:  # few errors of stores are an OSError
            logging.warning(
                "%s: a line is kept for later, it cannot be written: %s",
                self._path,
                str(error) or type(error).__name__,
            )

    def _append_to_disk(self) -> None:
        end = self._file.tell()
        try:
            # May write a part only, without an error.
            if self._file.write(self._waiting) < len(self._waiting):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._file.fileno(), end)
            raise
