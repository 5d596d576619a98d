"""The formats of record shards: TFRecord, ArrayRecord and webdataset tars.

`schema.py` describes a record, `shard_files.py` the TFRecord framing, and `tar_records.py` tars.
TFDS's `data_source`, grain and MaxText read ArrayRecord. The package `array_record` implements the
format and is imported inside the functions. An ArrayRecord shard holds the same records as a
TFRecord shard, one record per group, so each can be read alone. Its byte offsets are unknown, and
its reader opens local or mounted files only.
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

# Encoded images do not compress further.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# Fastest options for random access.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class TFRecordWriter(RecordWriter):
    """Writes one TFRecord shard and its index; see `RecordWriter`."""

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


class TFRecordSource(ShardedRecords):
    """Random access to the records of many shards, in the order of the shards.

    A grain `RandomAccessDataSource`. Without a `dataset.index`, missing indices of shards are
    built, and kept next to the shards if the folder is writable, else in memory.
    """

    kind = "tfrecord"
    shard_type = _TFRecordShard

    def unpack(self, index: int, piece: bytes) -> bytes:
        """Returns the element in a piece of an extent; see `ShardedRecords.unpack`."""
        data = unframe(piece, functools.partial(self.locate, index))
        if data is None:
            path, record = self.locate(index)
            raise DamagedRecordError(
                f"{path}: record {record}: its length is damaged (the checksum differs), or it is "
                "not where its index says; write the shard again"
            )
        return data

    def cut(self, first: int, last: int, data: bytes) -> np.ndarray:
        """Splits the bytes of an extent at the frames of records; see `ShardedRecords.cut`."""
        starts = [0]
        while len(starts) <= last - first and len(data) - starts[-1] >= FRAME_BYTES:
            length = framed_length(data[starts[-1] : starts[-1] + FRAME_BYTES])
            if length is None:  # damaged; the index states where the other records are
                break
            starts.append(starts[-1] + length)
        is_whole = len(starts) == last - first + 1 and starts[-1] == len(data)
        return np.array(starts, np.int64) if is_whole else super().cut(first, last, data)


class ArrayRecordWriter(RecordWriter):
    """Writes one ArrayRecord shard; equal records give equal bytes."""

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
    """Converts the package's RuntimeErrors, whose text contains the system's error, to OSErrors."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        number = next((n for n in errno.errorcode if f"{os.strerror(n)};" in text), errno.EIO)
        raise OSError(number, os.strerror(number)) from error


class _ArrayRecordShard(OpenShard):
    # Used only to build a `dataset.index`.
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
        # The numbers of the records are used as offsets.
        super().__init__(shard, np.arange(self._reader.num_records(), dtype=np.uint64))

    @classmethod
    def count(cls, shard: Shard) -> tuple[int, int, None]:
        if shard.index is not None and shard.num_bytes is not None:
            return shard.index.num_records.item(shard.row), shard.num_bytes, None
        opened = cls(shard)
        return opened.num_records, opened.size, None

    def read(self, record: int) -> bytes:
        if record >= self._reader.num_records():
            raise TFRecordError(f"{self.path}: record {record}: the shard was replaced")
        try:
            return self._reader.read([record])[0]
        except RuntimeError:
            # A transient disk failure raises the same error as damage; after a restart of a file
            # server, the descriptor is stale.
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

        # The package's reader does not report a missing file, and blocks on a pipe.
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

    Like `TFRecordSource`, but without extents of several records.
    """

    kind = "array_record"
    shard_type = _ArrayRecordShard

    def extent(self, first: int, last: int) -> tuple[str, int, int]:
        """Raises ValueError, since the byte offsets of records are unknown in this format."""
        raise ValueError(
            f"{self.locate(first)[0]}: ArrayRecord shards are not read by ranges of bytes; set "
            'config.data.order="global", or train on TFRecord shards or tars'
        )


def read_array_records(path: str, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """Yields the records of one shard in order; errors are those of `ArrayRecordSource`."""
    shard = _ArrayRecordShard(Shard(path))
    yield from map(shard.read, range(shard.num_records)[start:stop])


class ShardFormat(NamedTuple):
    """A format of shards."""

    # Random access to the records of many shards; its `kind` is the name of the format.
    source: type[ShardedRecords]
    writer: type[RecordWriter]  # writes one shard
    tfds_name: str | None = None  # TFDS's name of the format; None if TFDS cannot read it


# `config.output_format` -> format.
FORMATS = {
    "tfrecord": ShardFormat(TFRecordSource, TFRecordWriter, "tfrecord"),
    "array_record": ShardFormat(ArrayRecordSource, ArrayRecordWriter, "array_record"),
    "webdataset": ShardFormat(TarRecordSource, TarWriter),
}


def check_format(name: str, allowed: Iterable[str] = FORMATS) -> None:
    """Raises ValueError if a `config.output_format` is not allowed."""
    if name not in allowed:
        raise ValueError(f"config.output_format='{name}'; expected one of {', '.join(allowed)}")


def open_source(paths: Paths) -> ShardedRecords:
    """Opens the records of some shards, all of one format.

    Args:
        paths: a shard, a folder, a glob or a list of these; also their URLs.

    Raises:
        ShardsNotFoundError: there are no shards, several formats, or compressed tars.
        ValueError: a shard or an index is broken.
    """
    kind, shards = open_catalog(paths)
    return FORMATS[kind].source(paths, shards)


def open_writer(path: str | os.PathLike[str]) -> RecordWriter:
    """Opens a writer for one shard; the file name or URL determines the format."""
    kind = kind_of(os.fspath(path))
    if kind is None:
        suffixes = ", ".join(SUFFIXES.values())
        raise ValueError(f"{path}: not the name of a shard; expected one that ends in {suffixes}")
    return FORMATS[kind].writer(path)
