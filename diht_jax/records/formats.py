"""The formats of record shards: TFRecord, ArrayRecord and webdataset tars; which one a file has.

What a record holds is described in `schema.py`, the bytes around it in `shard_files.py`, tars in
`tar_records.py`. ArrayRecord is read by TFDS's `data_source`, grain and MaxText; its bytes are the
package `array_record`'s, which is imported inside of the functions. Such a shard holds the same
records as a TFRecord shard would, each in a group of its own, so that any of them is read alone. It
has no offsets that we know, and its reader takes local or mounted files only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
from collections.abc import Generator, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from diht_jax.records.catalog import Paths, Shard, open_catalog
from diht_jax.records.dataset_index import END_BYTES
from diht_jax.records.shard_files import (
    FRAME_BYTES,
    SUFFIXES,
    DamagedRecordError,
    RecordWriter,
    ShardIndex,
    TFRecordError,
    frame_footer,
    frame_header,
    framed_length,
    kind_of,
    scan_offsets,
    unframe,
)
from diht_jax.records.sharded import OpenShard, ShardedRecords
from diht_jax.records.tar_records import TarRecordSource, TarWriter
from diht_jax.storage.stores import check_readable, is_remote, open_local, retry

INDEX = ShardIndex(b"DIHTIDX1", FRAME_BYTES, alignment=1, is_gapless=True, scan=scan_offsets)

# Encoded images cannot be compressed any further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# The fastest for random access.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class TFRecordWriter(RecordWriter):
    """Writes one shard and its index; see `RecordWriter`."""

    index = INDEX

    def _open(self, path: pathlib.Path) -> None:
        self._file = open(path, "xb")  # noqa: SIM115 - closed by `_finish`

    def _append(self, data: bytes) -> None:
        self._offsets.append(self._file.tell())
        self._file.write(frame_header(len(data)))
        self._file.write(data)
        self._file.write(frame_footer(data))

    def _finish(self) -> None:
        self._file.close()


class _TFRecordShard(OpenShard):
    index = INDEX

    def read(self, record: int) -> bytes:
        data = unframe(super().read(record), lambda: (self.path, record))
        if data is not None:
            return data
        try:
            scan_offsets(self.path)
        except TFRecordError as error:
            raise DamagedRecordError(
                f"{self.path}: record {record}: its length is damaged (the checksum differs); "
                "write the shard again"
            ) from error
        raise self.wrong(f"record {record} is not where the index says")

    def _has_damaged_end(self, offsets: np.ndarray) -> bool:
        ends = np.append(offsets[1:], np.uint64(self.size))
        at_ends = (offsets < END_BYTES) | (ends + np.uint64(END_BYTES) > self.size)
        try:
            for record in np.flatnonzero(at_ends).tolist():
                self.read(record)
        except DamagedRecordError:
            return True
        return False


class TFRecordSource(ShardedRecords):
    """Random access to the records of many shards, in the order of the shards.

    A grain `RandomAccessDataSource`. Without a `dataset.index`, the missing indices of shards are
    built, and kept next to them where the folder can be written, in memory where it cannot.
    """

    kind = "tfrecord"
    shard_type = _TFRecordShard

    def unpack(self, index: int, piece: bytes) -> bytes:
        """The element of a record, of its piece of an extent; see `ShardedRecords.unpack`."""
        data = unframe(piece, functools.partial(self.locate, index))
        if data is None:
            path, record = self.locate(index)
            raise DamagedRecordError(
                f"{path}: record {record}: its length is damaged (the checksum differs), or it is "
                "not where its index says; write the shard again"
            )
        return data

    def cut(self, first: int, last: int, data: bytes) -> np.ndarray:
        """Cuts the bytes of an extent at its records by their frames; see `ShardedRecords.cut`."""
        starts = [0]
        while len(starts) <= last - first and len(data) - starts[-1] >= FRAME_BYTES:
            length = framed_length(data[starts[-1] : starts[-1] + FRAME_BYTES])
            if length is None:  # damaged; the index knows where the other records are
                break
            starts.append(starts[-1] + length)
        is_whole = len(starts) == last - first + 1 and starts[-1] == len(data)
        return np.array(starts, np.int64) if is_whole else super().cut(first, last, data)


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
    # Only `dataset.index` has it.
    index = ShardIndex(
        b"DIHTARR1",
        record_bytes=1,
        alignment=1,
        is_gapless=False,
        scan=lambda path: np.arange(_ArrayRecordShard(Shard(path)).num_records, dtype=np.uint64),
    )

    def __init__(self, shard: Shard, offsets: np.ndarray | None = None):
        if is_remote(shard.path):
            raise ValueError(
                f"{shard.path}: ArrayRecord shards are read from local or mounted folders only; "
                "mount or copy them, or train on TFRecord shards or tars, which are read by their "
                "URL"
            )
        self.path = shard.path
        self._reader = self._open()
        # The numbers of the records stand for their offsets.
        super().__init__(shard, np.arange(self._reader.num_records(), dtype=np.uint64))

    @classmethod
    def count(cls, shard: Shard) -> tuple[int, int, None]:
        if shard.index is not None and shard.num_bytes is not None:
            return shard.index.num_records.item(shard.row), shard.num_bytes, None
        opened = cls(shard)
        return opened.num_records, opened.size, None

    def _has_damaged_end(self, offsets: np.ndarray) -> bool:
        num_bytes = 0
        try:
            for record in range(len(offsets)):
                num_bytes += len(self.read(record))
                if num_bytes >= END_BYTES:
                    break
        except DamagedRecordError:
            return True
        return False

    def read(self, record: int) -> bytes:
        if record >= self._reader.num_records():
            raise TFRecordError(f"{self.path}: record {record}: the shard was replaced")
        try:
            return self._reader.read([record])[0]
        except RuntimeError:
            # The same error as for damage comes of a disk that fails for a moment; after a restart
            # of a file server, a descriptor stays stale.
            check_readable(self.path)
            self._reader = self._open()
        try:
            return self._reader.read([record])[0]
        except RuntimeError as error:
            raise DamagedRecordError(
                f"{self.path}: record {record} cannot be read ({error}); write the shard again"
            ) from error

    def _open(self) -> Any:
        from array_record.python import array_record_module

        # Its reader does not tell a missing file, and waits for a pipe.
        retry(functools.partial(open_local, self.path), self.path).close()
        reader = array_record_module.ArrayRecordReader(self.path, _READER_OPTIONS)
        if not reader.ok():
            check_readable(self.path)
            reader = array_record_module.ArrayRecordReader(self.path, _READER_OPTIONS)
        if not reader.ok():
            raise TFRecordError(
                f"{self.path}: not a whole ArrayRecord shard; write or copy it again"
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


def read_array_records(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yields the records of one shard in order; errors as those of `ArrayRecordSource`."""
    shard = _ArrayRecordShard(Shard(path))
    yield from map(shard.read, range(shard.num_records)[start:stop])


class ShardFormat(NamedTuple):
    """A format of shards."""

    # Random access to the records of many shards; its `kind` is the name of the format.
    source: type[ShardedRecords]
    writer: type[RecordWriter]  # of one shard
    tfds_name: str | None = None  # what TFDS calls it; None where it does not read it


# By the values of `config.output_format`.
FORMATS = {
    "tfrecord": ShardFormat(TFRecordSource, TFRecordWriter, "tfrecord"),
    "array_record": ShardFormat(ArrayRecordSource, ArrayRecordWriter, "array_record"),
    "webdataset": ShardFormat(TarRecordSource, TarWriter),
}


def check_format(name: str, allowed: Iterable[str] = FORMATS) -> None:
    """Raises ValueError for a `config.output_format` that is not one of those allowed."""
    if name not in allowed:
        raise ValueError(f"config.output_format='{name}'; expected one of {', '.join(allowed)}")


def open_source(paths: Paths) -> ShardedRecords:
    """The records of some shards, all of one format.

    Args:
        paths: a shard, a folder, a glob or a list of these; also their URLs.

    Raises:
        ShardsNotFoundError: nothing is found, several formats are, or tars that are compressed.
        ValueError: a shard or an index is broken.
    """
    found = open_catalog(paths)
    return FORMATS[found.kind].source(found)


def open_writer(path: str | os.PathLike[str]) -> RecordWriter:
    """A writer of one shard, such as `TFRecordWriter`, by the name of the shard or its URL."""
    kind = kind_of(os.fspath(path))
    if kind is None:
        suffixes = ", ".join(SUFFIXES.values())
        raise ValueError(f"{path}: not the name of a shard; expected one that ends in {suffixes}")
    return FORMATS[kind].writer(path)
