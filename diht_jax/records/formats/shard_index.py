"""The index of one shard, the file `SHARD.idx` next to it: where each of its records begins.

It is little-endian, and its header ties it to one shard::

    8 bytes magic | uint64 shard size | uint64 n | n x uint64 offset

The magic is "DIHTIDX1" of a TFRecord shard and "DIHTTAR1" of a tar. An index needs no checksum: a
record's own frame or header must fit its offsets when it is read.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable

import numpy as np

from diht_jax.records.format import TFRecordError
from diht_jax.storage.files import read_bytes, write_bytes
from diht_jax.storage.stores import is_remote

INDEX_SUFFIX = ".idx"

_HEADER = struct.Struct("<8sQQ")


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Reads and writes the indices of shards of one format."""

    magic: bytes  # the first 8 bytes
    record_bytes: int  # fewest of a record
    alignment: int  # records begin at multiples of it
    is_gapless: bool  # whether the records fill the shard
    # Finds the offsets of a shard, uint64 [n], without an index; raises `TFRecordError` where the
    # shard is damaged.
    scan: Callable[[str], np.ndarray]

    def load(self, path: str, shard_bytes: int) -> np.ndarray | None:
        """The offsets of the index, uint64 [n]; None where there is no index.

        Those of a local shard are memory-mapped: processes that read the same shards share them.

        Raises:
            TFRecordError: the index is damaged or another shard's, or the shard is cut off.
        """
        try:
            if is_remote(path):
                data = np.frombuffer(read_bytes(path + INDEX_SUFFIX), np.uint8)
            elif os.path.getsize(path + INDEX_SUFFIX):
                data = np.memmap(path + INDEX_SUFFIX, np.uint8, "r")
            else:  # nothing cannot be mapped
                data = np.zeros(0, np.uint8)
        except FileNotFoundError:
            return None
        header = data[: _HEADER.size].tobytes()
        if len(header) < _HEADER.size or not header.startswith(self.magic):
            raise wrong_index(path, "it has no valid header")
        _, expected_bytes, count = _HEADER.unpack(header)
        if len(data) != _HEADER.size + 8 * count:
            raise wrong_index(path, f"its size is not that of an index of {count} records")
        if self.is_gapless and bool(count) != bool(expected_bytes):
            raise wrong_index(path, f"it has {count} records for {expected_bytes} bytes")
        if expected_bytes != shard_bytes:
            # A shard that was cut off has the right index: the scan finds that and raises.
            self.scan(path)
            raise wrong_index(
                path, f"it was made for {expected_bytes} bytes, the shard has {shard_bytes}"
            )
        offsets = data[_HEADER.size :].view("<u8")
        if self.is_gapless and count and offsets[0] != 0:
            raise wrong_index(path, "the first record does not begin the shard")
        # Where no record can begin, a read could request any size.
        bounds = np.append(offsets, np.uint64(shard_bytes)).astype(np.int64)
        is_wrong = (np.diff(bounds) < self.record_bytes) | (bounds[:-1] < 0)
        is_wrong |= bounds[:-1] % self.alignment > 0
        if is_wrong.any():
            number = int(np.argmax(is_wrong))
            raise wrong_index(path, f"record {number} would be at byte {offsets[number]}")
        return offsets

    def find(self, path: str, shard_bytes: int, *, trust_index: bool = True) -> np.ndarray:
        """The offsets of a shard, from its index or by a scan; nothing is written."""
        offsets = self.load(path, shard_bytes) if trust_index else None
        return self.scan(path) if offsets is None else offsets

    def write(self, path: str, offsets: np.ndarray, shard_bytes: int) -> None:
        """Writes the index of a shard."""
        header = _HEADER.pack(self.magic, shard_bytes, len(offsets))
        write_bytes(path + INDEX_SUFFIX, header + offsets.astype("<u8").tobytes())


def wrong_index(path: str, detail: str) -> TFRecordError:
    """The error for an index that does not describe its shard."""
    return TFRecordError(
        f"{path}{INDEX_SUFFIX} does not belong to {path} ({detail}); delete the index, it is built "
        "again on the next use"
    )
