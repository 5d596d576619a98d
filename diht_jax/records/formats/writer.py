"""What the writers of all formats share: a shard appears whole, at `close`, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
from typing import Protocol

import numpy as np

from diht_jax.records.formats.shard_index import INDEX_SUFFIX, ShardIndex
from diht_jax.storage import files


class RecordSink(Protocol):
    """Takes the records of a shard one by one: a writer, or what changes them before one."""

    path: str

    def write(self, data: bytes) -> None:
        """Appends one record."""

    def __len__(self) -> int: ...


class RecordWriter:
    """Writes one shard, local or in a store; use it as a context manager.

    Leaving normally closes, leaving by an exception discards. Bytes go to a temporary file, so that
    a reader never sees half a shard. A format gives `_open`, `_append` and `_finish`.

    Attributes:
        path: of the shard, or its URL.
    """

    index: ShardIndex | None = None  # of the format; its `_append` then notes the offsets

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the temporary file."""
        self.path = os.fspath(path)
        self._output = files.local_output(self.path)
        self._local = self._output.__enter__()
        self._offsets: list[int] = []
        self._count = 0
        self._is_open = True
        self._open(self._local)

    def write(self, data: bytes) -> None:
        """Appends one record, such as `schema.encode_record` gives."""
        self._append(data)
        self._count += 1

    def __len__(self) -> int:
        """Records written so far."""
        return self._count

    def close(self) -> None:
        """Gives the shard its name, and writes its index; a second call does nothing."""
        if not self._is_open:
            return
        try:
            self._finish()
            size = self._local.stat().st_size
            if self.index is not None:
                # An old index must not stand next to the new shard, not even for a moment.
                files.remove(self.path + INDEX_SUFFIX)
        except BaseException as error:
            self.discard(error)
            raise
        self._is_open = False
        self._output.__exit__(None, None, None)
        if self.index is not None:
            self.index.write(self.path, np.array(self._offsets, np.uint64), size)

    def discard(self, error: BaseException | None = None) -> None:
        """Throws away what was written; nothing is left.

        `error`, the reason, is raised with the name of the shard where it has none.
        """
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(OSError):  # of bytes that nobody wants
            self._finish()
        error = error or RuntimeError("discarded")  # so that the output does not get its name
        self._output.__exit__(type(error), error, error.__traceback__)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, _: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard(error)

    def _open(self, path: pathlib.Path) -> None:
        """Opens a new file of this name."""
        raise NotImplementedError

    def _append(self, data: bytes) -> None:
        """Writes a record into it."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Completes and closes it; a second call does nothing."""
        raise NotImplementedError
