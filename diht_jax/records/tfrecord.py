"""TFRecord shards: a writer, and random access over many shards.

What a record holds is described in `schema.py`, the bytes around it in `format.py`.
"""

from __future__ import annotations

import pathlib

import numpy as np

from diht_jax.records.dataset_index import END_BYTES
from diht_jax.records.format import (
    FRAME_BYTES,
    DamagedRecordError,
    TFRecordError,
    frame_footer,
    frame_header,
    framed_length,
    scan_offsets,
    unframe,
)
from diht_jax.records.formats.shard_index import ShardIndex
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.sharded import OpenShard, ShardedRecords

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


class _TFRecordShard(OpenShard):
    index = INDEX

    def read(self, record: int) -> bytes:
        data = unframe(super().read(record), self.path, record)
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
        path, record = self.locate(index)
        data = unframe(piece, path, record)
        if data is None:
            raise self._damaged_length(index)
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

    def _damaged_length(self, index: int) -> DamagedRecordError:
        path, record = self.locate(index)
        return DamagedRecordError(
            f"{path}: record {record}: its length is damaged (the checksum differs), or it is "
            "not where its index says; write the shard again"
        )
