"""ArrayRecord shards, as TFDS's `data_source`, grain and MaxText read them.

The bytes are the package `array_record`'s, which is imported inside of the functions. A shard holds
the same records as a TFRecord shard would, each in a group of its own, so that any of them is read
alone. It has no offsets that we know, and its reader takes local or mounted files only.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from diht_jax.records.catalog import Shard
from diht_jax.records.dataset_index import digest_shard
from diht_jax.records.format import DamagedRecordError, TFRecordError
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.sharded import OpenShard, ShardedRecords, read_ends
from diht_jax.storage.retries import retry
from diht_jax.storage.stores import RangesFile, check_readable, is_remote, open_local

# Encoded images cannot be compressed any further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# The fastest for random access.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecordWriter(RecordWriter):
    """Writes one shard; equal records give equal bytes."""

    def _open(self, path: pathlib.Path) -> None:
        from array_record.python import array_record_module

        self._writer = array_record_module.ArrayRecordWriter(os.fspath(path), _WRITER_OPTIONS)

    def _append(self, data: bytes) -> None:
        with _system_errors():
            self._writer.write(data)

    def _finish(self) -> None:
        with _system_errors():
            self._writer.close()


@contextlib.contextmanager
def _system_errors() -> Generator[None]:
    """Raises OSErrors for the package's RuntimeErrors, which have the system's error as text."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        number = next((n for n in errno.errorcode if f"{os.strerror(n)};" in text), errno.EIO)
        raise OSError(number, os.strerror(number)) from error


class _ArrayRecordShard(OpenShard):
    def __init__(self, shard: Shard, offsets: np.ndarray | None = None):
        self._path = shard.path
        if is_remote(self._path):
            raise ValueError(
                f"{self._path}: ArrayRecord shards are read from local or mounted folders only; "
                "mount or copy them, or train on TFRecord shards or tars, which are read by their "
                "URL"
            )
        self._reader = self._open()

    @classmethod
    def count(cls, shard: Shard) -> tuple[int, int, None]:
        return len(cls(shard)), os.path.getsize(shard.path), None

    def identify(self) -> tuple[int, int, str]:
        with RangesFile(self._path) as file:
            # The numbers of the records stand for their offsets.
            return len(self), file.size, digest_shard(np.arange(len(self)), *read_ends(file))

    def __len__(self) -> int:
        return self._reader.num_records()

    def read(self, record: int) -> bytes:
        if record >= len(self):
            raise TFRecordError(f"{self._path}: record {record}: the shard was replaced")
        try:
            return self._reader.read([record])[0]
        except RuntimeError:
            # The same error as for damage comes of a disk that fails for a moment; after a restart
            # of a file server, a descriptor stays stale.
            check_readable(self._path)
            self._reader = self._open()
        try:
            return self._reader.read([record])[0]
        except RuntimeError as error:
            raise DamagedRecordError(
                f"{self._path}: record {record} cannot be read ({error}); write the shard again"
            ) from error

    def _open(self) -> Any:
        from array_record.python import array_record_module

        # Its reader does not tell a missing file, and waits for a pipe.
        retry(lambda: open_local(self._path), self._path).close()
        reader = array_record_module.ArrayRecordReader(self._path, _READER_OPTIONS)
        if not reader.ok():
            check_readable(self._path)
            reader = array_record_module.ArrayRecordReader(self._path, _READER_OPTIONS)
        if not reader.ok():
            raise TFRecordError(
                f"{self._path}: not a whole ArrayRecord shard; write or copy it again"
            )
        return reader


class ArrayRecordSource(ShardedRecords):
    """Random access to the records of many shards, in the order of the shards.

    Like `TFRecordSource`; but no extent of several records is known.
    """

    kind = "array_record"
    shard_type = _ArrayRecordShard

    def extent(self, first: int, last: int) -> tuple[str, int, int]:
        """Raises ValueError: the places of records are not known of this format."""
        raise ValueError(
            f"{self.locate(first)[0]}: ArrayRecord shards are not read by ranges of bytes; set "
            'config.data.order="global", or train on TFRecord shards or tars'
        )


def read_array_records(path: str) -> Iterator[bytes]:
    """Yields the records of one shard in order; errors as those of `ArrayRecordSource`."""
    shard = _ArrayRecordShard(Shard(path))
    for record in range(len(shard)):
        yield shard.read(record)
