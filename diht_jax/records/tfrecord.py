"""TFRecord shards: a writer, and random access over many shards.

What a record holds is described in `schema.py`, the bytes around it in `format.py`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np

from diht_jax.records.catalog import Shard, find_shards, is_shard
from diht_jax.records.format import (
    FRAME_BYTES,
    DamagedRecordError,
    TFRecordError,
    frame_footer,
    frame_header,
    framed_length,
    read_records,
    scan_offsets,
    unframe,
)
from diht_jax.records.formats.shard_index import ShardIndex
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.sharded import OpenShard, ShardedRecords
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

INDEX = ShardIndex(b"DIHTIDX1", FRAME_BYTES, alignment=1, is_gapless=True, scan=scan_offsets)


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


class TFRecordSource(ShardedRecords):
    """Random access to the records of many shards, in the order of the shards.

    A grain `RandomAccessDataSource`. Without a `dataset.index`, the missing indices of shards are
    built, and kept next to them where the folder can be written, in memory where it cannot.
    """

    kind = "tfrecord"
    index = INDEX

    def unpack(self, index: int, piece: bytes) -> bytes:
        """The element of a record, of its piece of an extent; see `ShardedRecords.unpack`."""
        path, record = self.locate(index)
        data = unframe(piece, path, record)
        if data is None:
            raise DamagedRecordError(
                f"{path}: record {record}: its length is damaged (the checksum differs), or it is "
                "not where its index says; write the shard again"
            )
        return data

    def _starts_within(self, path: str, data: bytes) -> list[int]:
        starts = [0]
        while starts[-1] < len(data):
            length = framed_length(data[starts[-1] : starts[-1] + FRAME_BYTES])
            if length is None or starts[-1] + length > len(data):
                break
            starts.append(starts[-1] + length)
        return starts

    @classmethod
    def _open(
        cls, shards: Sequence[Shard], in_memory: dict[int, np.ndarray], number: int
    ) -> OpenShard:
        return _OpenShard(shards[number], cls.index, in_memory.get(number))


class _OpenShard(OpenShard):
    def read(self, record: int) -> bytes:
        data = unframe(super().read(record), self.path, record)
        if data is None:
            raise self._explain(record)
        return data

    def _explain(self, record: int) -> TFRecordError:
        """Tells a damaged length from a broken shard and from an index of another one."""
        neighbours = [n for n in (record - 1, record + 1) if 0 <= n < self.num_records]
        # A frame of another length where the index has one: then it is the index that is wrong.
        is_damaged = self._framed_length(record) is None
        if is_damaged and neighbours and all(map(self._has_frame, neighbours)):
            return DamagedRecordError(
                f"{self.path}: record {record}: its length is damaged (the checksum differs); "
                "write the shard again"
            )
        if not is_remote(self.path):
            try:
                scan_offsets(self.path)
            except TFRecordError as error:
                return error
        return self.wrong(f"record {record} is not where the index says")

    def _has_frame(self, record: int) -> bool:
        start, end = self.extent(record, record + 1)
        return self._framed_length(record) == end - start

    def _framed_length(self, record: int) -> int | None:
        start, _ = self.extent(record, record + 1)
        return framed_length(self.read_range(start, min(self.size, start + FRAME_BYTES)))
