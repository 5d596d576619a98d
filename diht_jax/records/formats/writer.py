"""What the writers of all formats share: a shard appears whole, at `close`, or not at all."""

from __future__ import annotations

import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

from diht_jax.records.format import INDEX_SUFFIX, index_path
from diht_jax.storage.files import commit, remove, temporary_path, upload


class RecordWriter(Protocol):
    """What writes one shard of any format, as a context manager.

    Attributes:
        path: of the shard, or its URL.
    """

    path: pathlib.Path | str

    def write(self, data: bytes) -> None:
        """Appends one record, as `schema.encode_record` gives it."""

    def __len__(self) -> int:
        """Records written so far."""


class ShardWriter:
    """Writes one shard; use it as a context manager, as `TFRecordWriter`.

    A format gives `_open`, `_append` and `_finish`. Bytes go to a temporary name in the same
    folder, are synced to disk and then renamed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the temporary file.

        Args:
            path: of the shard; its folder must exist.
        """
        self.path = pathlib.Path(path)
        self._temporary = temporary_path(self.path)
        self._count = 0
        self._is_open = True
        self._open(self._temporary)

    def write(self, data: bytes) -> None:
        """Appends one record.

        Args:
            data: the record, such as `schema.encode_record` gives.
        """
        self._append(data)
        self._count += 1

    def __len__(self) -> int:
        """Records written so far."""
        return self._count

    def close(self) -> None:
        """Syncs and renames; a second call does nothing."""
        if not self._is_open:
            return
        try:
            self._finish()
            self._is_open = False
            self._replace()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Throws away what was written; nothing is left on disk."""
        if self._is_open:
            self._is_open = False
            self._finish()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()

    def _open(self, path: pathlib.Path) -> None:
        """Opens a file of this name."""
        raise NotImplementedError

    def _append(self, data: bytes) -> None:
        """Writes a record into it."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Completes and closes it."""
        raise NotImplementedError

    def _replace(self) -> None:
        """Gives the complete file its name."""
        commit(self._temporary, self.path)


class StoreWriter:
    """Writes one shard to a store; use it as `ShardWriter`.

    The shard and its index are made in the system's temporary folder, and uploaded at `close`.
    """

    def __init__(self, url: str, writer: Callable[[str], Any]):
        """Opens the temporary file.

        Args:
            url: of the shard.
            writer: of a local shard of its format.
        """
        self.path = url
        self._folder = tempfile.TemporaryDirectory(prefix="diht_jax-")
        self._local = os.path.join(self._folder.name, url.rsplit("/", 1)[1])
        self._writer = writer(self._local)

    def write(self, data: bytes) -> None:
        """Appends one record."""
        self._writer.write(data)

    def __len__(self) -> int:
        """Records written so far."""
        return len(self._writer)

    def close(self) -> None:
        """Uploads; a second call does nothing.

        Raises:
            StorageError: the store does not take it, now and after some attempts.
        """
        try:
            self._writer.close()
            if not os.path.exists(self._local):
                return
            index = index_path(self._local)
            if index.exists():
                # An old index must not stand beside the new shard, not even for a moment.
                remove(self.path + INDEX_SUFFIX)
            upload(self._local, self.path)
            if index.exists():
                upload(index, self.path + INDEX_SUFFIX)
        finally:
            self._folder.cleanup()

    def discard(self) -> None:
        """Throws away what was written; nothing is uploaded."""
        self._writer.discard()
        self._folder.cleanup()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()
