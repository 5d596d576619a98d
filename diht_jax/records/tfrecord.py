"""TFRecord shards: a writer, and random access over many shards.

What a record holds belongs in `schema.py`, the bytes around it in `format.py`.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from diht_jax.records import schema
from diht_jax.records.catalog import Shard, find_shards, is_shard
from diht_jax.records.format import (
    FRAME_BYTES,
    DamagedRecordError,
    TFRecordError,
    frame_footer,
    frame_header,
    framed_length,
    index_path,
    load_offsets,
    read_index_count,
    read_records,
    read_stored_index,
    scan_offsets,
    unframe,
    write_index,
)
from diht_jax.records.sharded import ArrayOffsets, OpenShard, ShardedRecords
from diht_jax.storage.files import input_size, temporary_path
from diht_jax.storage.stores import is_remote

__all__ = [
    "DamagedRecordError",
    "TFRecordError",
    "TFRecordSource",
    "TFRecordWriter",
    "find_shards",
    "is_shard",
    "read_records",
]


class TFRecordWriter:
    """Writes one shard and its index; both appear at `close`, or not at all.

    Use it as a context manager: leaving normally closes, leaving by an exception discards.
    Bytes go to a temporary name in the same folder, are synced to disk and then renamed, so that
    a reader never sees half a shard.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the temporary file.

        Args:
            path: of the shard; its folder must exist.
        """
        self.path = pathlib.Path(path)
        self._offsets: list[int] = []
        self._position = 0
        self._temporary = temporary_path(self.path)
        self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed by close and discard

    def write(self, data: bytes) -> None:
        """Appends one record.

        Args:
            data: the record, such as `schema.encode_record` gives.
        """
        header, footer = frame_header(len(data)), frame_footer(data)
        self._file.write(header)
        self._file.write(data)
        self._file.write(footer)
        self._offsets.append(self._position)
        self._position += len(header) + len(data) + len(footer)

    def __len__(self) -> int:
        """Records written so far."""
        return len(self._offsets)

    def close(self) -> None:
        """Syncs and renames; a second call does nothing."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            # An old index must not stand beside the new shard, not even for a moment.
            index_path(self.path).unlink(missing_ok=True)
            os.replace(self._temporary, self.path)
        except BaseException:
            self.discard()
            raise
        write_index(self.path, np.array(self._offsets, np.uint64), self._position)

    def discard(self) -> None:
        """Throws away what was written; nothing is left on disk."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> TFRecordWriter:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()


class TFRecordSource(ShardedRecords):
    """Random access to the records of many shards, in the order of the shards.

    A grain `RandomAccessDataSource`. Without a `dataset.index`, the missing indices of shards are
    built, and kept beside them where the folder can be written, in memory where it cannot.
    """

    kind = "tfrecord"

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one record.

        Args:
            index: in [0, len).

        Raises:
            IndexError: the index is negative or too large.
            TFRecordError: the record is damaged, or the index beside its shard is another's.
        """
        number, record = self._find(index)
        return self._open_shard(number).read(record)

    def cut(self, first: int, last: int, data: bytes) -> np.ndarray:
        """Where each record lies in the bytes of an extent.

        Args:
            first, last: of the extent.
            data: its bytes.

        Returns:
            int64 [last - first + 1], where each record's piece begins; the last entry is its end.

        Raises:
            TFRecordError: these are not the bytes of the extent.
        """
        number, begin, end = self._find_range(first, last)
        starts = [0]
        while len(starts) <= last - first:
            length = framed_length(data[starts[-1] : starts[-1] + FRAME_BYTES])
            if length is None or starts[-1] + length > len(data):
                break
            starts.append(starts[-1] + length)
        if len(starts) == last - first + 1 and starts[-1] == len(data):
            return np.array(starts, np.int64)
        # A damaged length: only the index knows where the next record begins.
        shard = self._open_shard(number)
        ends = [shard.extent(record, record + 1)[1] for record in range(begin, end)]
        starts = np.array([shard.extent(begin, end)[0], *ends], np.int64)
        if starts[-1] - starts[0] != len(data):
            raise TFRecordError(
                f"{self.paths[number]}: records {begin} to {end - 1}: {len(data)} bytes were read, "
                f"and {starts[-1] - starts[0]} expected; the shard was replaced or cut off"
            )
        return starts - starts[0]

    def unpack(self, index: int, piece: bytes) -> bytes:
        """The element of a record, of its piece of an extent.

        Args:
            index: in [0, len).
            piece: the bytes between two entries of `cut`.

        Raises:
            TFRecordError: the record is damaged.
        """
        path, record = self.locate(index)
        data = unframe(piece, path, record)
        if data is None:
            raise DamagedRecordError(
                f"{path}: record {record}: its length is damaged (the checksum differs), or it is "
                "not where its index says; write the shard again"
            )
        return data

    def split(self, first: int, last: int, data: bytes) -> list[bytes | TFRecordError]:
        """Cuts the bytes of an extent into elements.

        Args:
            first, last: of the extent.
            data: its bytes.

        Returns:
            What `self[n]` gives, for n in [first, last); the error that it raises where a record is
            damaged.

        Raises:
            TFRecordError: these are not the bytes of the extent.
        """
        starts, elements = self.cut(first, last, data), []
        for number in range(last - first):
            try:
                piece = data[starts[number] : starts[number + 1]]
                elements.append(self.unpack(first + number, piece))
            except TFRecordError as error:
                elements.append(error)
        return elements

    @staticmethod
    def decode(element: bytes) -> schema.Record:
        """The record of an element; errors as of `schema.decode_record`."""
        return schema.decode_record(element)

    @staticmethod
    def _count_records(shard: Shard) -> tuple[int, int, np.ndarray | None]:
        path = shard.path
        if is_remote(path):
            size = input_size(path) if shard.num_bytes is None else shard.num_bytes
            offsets = read_stored_index(path, size)
            if offsets is not None:
                return len(offsets), size, None
        else:
            size = os.stat(path).st_size
            count = read_index_count(path, size)
            if count is not None:
                return count, size, None
        offsets = scan_offsets(path)
        with contextlib.suppress(OSError):
            write_index(path, offsets, size)
            return len(offsets), size, None
        return len(offsets), size, offsets

    @staticmethod
    def _open(shards: Sequence[Shard], in_memory: dict[int, np.ndarray], number: int) -> _OpenShard:
        return _OpenShard(shards[number], in_memory.get(number))


class _OpenShard(OpenShard):
    def __init__(self, shard: Shard, offsets: np.ndarray | None):
        super().__init__(shard)
        if shard.index is None:
            if offsets is None:
                offsets = find_offsets(self.path, self.size)
            self.offsets = ArrayOffsets(self.path, offsets, self.size)

    def read(self, record: int) -> bytes:
        if record >= len(self.offsets):
            raise self.offsets.wrong(f"record {record}: the shard or its index was replaced")
        data = unframe(self.read_range(*self.extent(record, record + 1)), self.path, record)
        if data is None:
            raise self._explain(record)
        return data

    def _explain(self, record: int) -> TFRecordError:
        """Tells a damaged length from a broken shard and from an index of another one."""
        beside = [n for n in (record - 1, record + 1) if 0 <= n < len(self.offsets)]
        # A frame of another length where the index has one: then it is the index that is wrong.
        is_damaged = self._framed_length(record) is None
        if is_damaged and beside and all(map(self._has_frame, beside)):
            return DamagedRecordError(
                f"{self.path}: record {record}: its length is damaged (the checksum differs); "
                "write the shard again"
            )
        if not is_remote(self.path):
            try:
                scan_offsets(self.path)
            except TFRecordError as error:
                return error
        return self.offsets.wrong(f"record {record} is not where the index says")

    def _has_frame(self, record: int) -> bool:
        start, end = self.extent(record, record + 1)
        return self._framed_length(record) == end - start

    def _framed_length(self, record: int) -> int | None:
        start, _ = self.extent(record, record + 1)
        return framed_length(self.read_range(start, min(self.size, start + FRAME_BYTES)))


def find_offsets(path: str, shard_bytes: int, *, trust_index: bool = True) -> np.ndarray:
    """Where the records of a shard begin, of the index beside it or by a scan; nothing is written.

    Args:
        path: of the shard, or its URL.
        shard_bytes: its size.
        trust_index: whether an index beside it is taken.

    Returns:
        uint64 [n].

    Raises:
        TFRecordError: the shard or its index is broken.
    """
    load = read_stored_index if is_remote(path) else load_offsets
    offsets = load(path, shard_bytes) if trust_index else None
    return scan_offsets(path) if offsets is None else offsets
