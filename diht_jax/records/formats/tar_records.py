"""Webdataset tars as record shards: an index of their samples, and random access.

An element is a piece of the archive, from the first header of a sample to that of the next one that
is a pair; its first sample is the record. Samples without image or caption, and those whose key was
there before, are left out when the index is made. The index is ours, `SHARD.tar.idx`,
little-endian::

    8 bytes "DIHTTAR1" | uint64 shard size | uint64 n | n x uint64 offset

What the members mean belongs in `tar_samples.py`; the same samples give the same records as the
reader of tars gives pairs. A tar has checksums of its headers alone: contents that were damaged are
noticed where they cannot be decoded.
"""

from __future__ import annotations

import collections
import contextlib
import io
import struct
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from absl import logging

from diht_jax.records import schema
from diht_jax.records.catalog import Shard
from diht_jax.records.format import INDEX_SUFFIX, DamagedRecordError, TFRecordError
from diht_jax.records.formats import tar_samples
from diht_jax.records.formats.tar_members import walk_members
from diht_jax.records.samples import SampleError, Skipped
from diht_jax.records.sharded import ArrayOffsets, OpenShard, ShardedRecords
from diht_jax.storage.files import input_size, read_bytes, write_bytes
from diht_jax.storage.stores import check_failure, is_remote, open_file

BLOCK_BYTES = 512  # headers and contents begin at multiples of it
TAR_SUFFIX = ".tar"

_MAGIC = b"DIHTTAR1"
_HEADER = struct.Struct("<8sQQ")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


def scan_samples(file: BinaryIO, path: str) -> tuple[np.ndarray, collections.Counter[str]]:
    """Walks through a tar from header to header; images are not read.

    Args:
        file: the tar, open for reading and seeking.
        path: of the tar, for messages.

    Returns:
        uint64 [n], where each sample that is a pair begins; reason -> count of the others.

    Raises:
        TFRecordError: it is compressed, damaged or cut off.
    """
    compression = _COMPRESSED.get(file.read(2))
    if compression is not None:
        raise TFRecordError(
            f"{path}: a tar that is compressed ({compression}) has no random access; unpack it to "
            "a plain .tar, or make record shards of it by `python -m data_prep.filter --config "
            "configs/prep/convert.py`"
        )
    offsets: list[int] = []
    skipped: collections.Counter[str] = collections.Counter()
    try:
        members = walk_members(
            file,
            path,
            tar_samples.size_limit,
            is_divisible=True,
            is_read=lambda name: not tar_samples.is_image(name),
        )
        for offset, entry in tar_samples.make_pairs(tar_samples.group_members(members)):
            if isinstance(entry, Skipped):
                skipped[entry.reason] += 1
            else:
                offsets.append(offset)
    except ValueError as error:
        if isinstance(error, OSError):  # StorageError: the tar itself may be good
            raise
        raise TFRecordError(str(error)) from error
    return np.array(offsets, np.uint64), skipped


def _scan_piece(data: bytes, path: str) -> list[int]:
    """Where the pairs of a piece of a tar begin.

    A sample whose key was there before the piece counts as well. So these are the elements of the
    index only if there are as many.
    """
    try:
        members = walk_members(
            io.BytesIO(data),
            path,
            tar_samples.size_limit,
            is_piece=True,
            is_divisible=True,
            is_read=lambda name: not tar_samples.is_image(name),
        )
        pairs = tar_samples.make_pairs(tar_samples.group_members(members))
        return [offset for offset, entry in pairs if not isinstance(entry, Skipped)]
    except ValueError:
        return []


def decode_element(element: bytes, where: str = "a tar") -> schema.Record:
    """The record of an element.

    Args:
        element: a piece of a tar that begins with the first header of a sample.
        where: of the element, for messages.

    Raises:
        SampleError: the sample is no pair.
        DamagedRecordError: there is no header, or one is damaged.
    """
    try:
        members = walk_members(
            io.BytesIO(element), where, tar_samples.size_limit, is_piece=True, is_divisible=True
        )
        sample = next(tar_samples.group_members(members), None)
    except ValueError as error:
        raise DamagedRecordError(str(error)) from error
    if sample is None or sample.offset:
        raise DamagedRecordError(f"{where}: no sample begins where the index states one")
    pair = tar_samples.make_pair(sample)
    if isinstance(pair, Skipped):
        raise SampleError(pair)
    return schema.Record(pair.key, pair.image, pair.caption, pair.metadata)


class TarRecordSource(ShardedRecords):
    """Random access to the samples of many tars, in the order of the tars.

    As `TFRecordSource`, with one ranged request for a sample. An index that is missing is made, and
    kept beside its tar where the folder can be written, in memory where it cannot.
    """

    kind = "tar"

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one element.

        Args:
            index: in [0, len).

        Raises:
            IndexError: the index is negative or too large.
            TFRecordError: the tar or its index was replaced.
        """
        number, record = self._find(index)
        return self._open_shard(number).read(record)

    def cut(self, first: int, last: int, data: bytes) -> np.ndarray:
        """Where each element lies in the bytes of an extent; as `TFRecordSource.cut`."""
        number, begin, end = self._find_range(first, last)
        # The offsets of a tar in a store may have to be requested, its headers are here.
        if is_remote(self.paths[number]):
            starts = _scan_piece(data, self.paths[number])
            if len(starts) == last - first and not starts[0]:
                return np.array([*starts, len(data)], np.int64)
        shard = self._open_shard(number)
        extents = [shard.extent(record, record + 1) for record in range(begin, end)]
        starts = np.array([extents[0][0], *(stop for _, stop in extents)], np.int64)
        if starts[-1] - starts[0] != len(data):
            raise TFRecordError(
                f"{self.paths[number]}: samples {begin} to {end - 1}: {len(data)} bytes were read, "
                f"and {starts[-1] - starts[0]} expected; the tar was replaced or cut off"
            )
        return starts - starts[0]

    def unpack(self, index: int, piece: bytes) -> bytes:
        """The element of a record, of its piece of an extent: the piece itself."""
        del index
        return piece

    def split(self, first: int, last: int, data: bytes) -> list[bytes]:
        """Cuts the bytes of an extent into elements; as `TFRecordSource.split`."""
        starts = self.cut(first, last, data)
        return [data[begin:end] for begin, end in zip(starts[:-1], starts[1:], strict=True)]

    @staticmethod
    def decode(element: bytes) -> schema.Record:
        """The record of an element; errors as of `decode_element`."""
        return decode_element(element)

    @staticmethod
    def _count_records(shard: Shard) -> tuple[int, int, np.ndarray | None]:
        size = input_size(shard.path) if shard.num_bytes is None else shard.num_bytes
        offsets = _read_index(shard.path, size)
        if offsets is not None:
            return len(offsets), size, None
        offsets = scan_tar(shard.path)
        is_kept = _write_index(shard.path, encode_index(offsets, size))
        return len(offsets), size, None if is_kept else offsets

    @staticmethod
    def _open(shards: Sequence[Shard], in_memory: dict[int, np.ndarray], number: int) -> _OpenTar:
        return _OpenTar(shards[number], in_memory.get(number))


class _OpenTar(OpenShard):
    def __init__(self, shard: Shard, offsets: np.ndarray | None):
        super().__init__(shard)
        if shard.index is None:
            if offsets is None:
                offsets = find_offsets(self.path, self.size)
            self.offsets = ArrayOffsets(self.path, offsets, self.size)

    def read(self, record: int) -> bytes:
        """The bytes of an element."""
        if record >= len(self.offsets):
            raise self.offsets.wrong(f"sample {record}: the tar or its index was replaced")
        return self.read_range(*self.extent(record, record + 1))


def scan_tar(path: str) -> np.ndarray:
    """Where the samples of a tar begin, local or in a store; those that are no pairs are logged.

    Returns:
        uint64 [n].

    Raises:
        TFRecordError: it is compressed, damaged or cut off.
        StorageError: it cannot be read, now and after some attempts.
    """
    with open_file(path) as file:
        try:
            offsets, skipped = scan_samples(file, path)
        except TFRecordError:
            check_failure(file)  # the tar itself may be good
            raise
    if skipped:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(skipped.items()))
        logging.warning("%s: %d samples are left out: %s", path, skipped.total(), counts)
    return offsets


def find_offsets(path: str, shard_bytes: int, *, trust_index: bool = True) -> np.ndarray:
    """Where the samples of a tar begin; as `tfrecord.find_offsets`, nothing is written."""
    offsets = _read_index(path, shard_bytes) if trust_index else None
    return scan_tar(path) if offsets is None else offsets


def _read_index(path: str, shard_bytes: int) -> np.ndarray | None:
    """The offsets of the index beside a tar; None where there is none."""
    try:
        data = read_bytes(path + INDEX_SUFFIX)
    except FileNotFoundError:
        return None
    return decode_index(path, data, shard_bytes)


def _write_index(path: str, data: bytes) -> bool:
    """Writes the index beside a tar; returns whether that was possible."""
    with contextlib.suppress(OSError):
        write_bytes(path + INDEX_SUFFIX, data)
        return True
    return False


def encode_index(offsets: np.ndarray, shard_bytes: int) -> bytes:
    """The contents of the index of a tar."""
    return _HEADER.pack(_MAGIC, shard_bytes, len(offsets)) + offsets.astype("<u8").tobytes()


def decode_index(path: str, data: bytes, shard_bytes: int) -> np.ndarray:
    """The offsets of an index.

    Args:
        path: of the tar, for messages.
        data: contents of the index.
        shard_bytes: size of the tar, which the index must confirm.

    Raises:
        TFRecordError: the index is damaged or another tar's.
    """
    if len(data) < _HEADER.size or not data.startswith(_MAGIC):
        raise wrong_index(path, "it has no valid header")
    _, expected_bytes, count = _HEADER.unpack_from(data)
    if len(data) != _HEADER.size + 8 * count:
        raise wrong_index(path, f"its size is not that of an index of {count} records")
    if expected_bytes != shard_bytes:
        raise wrong_index(
            path, f"it was made for {expected_bytes} bytes, the tar has {shard_bytes}"
        )
    offsets = np.frombuffer(data, "<u8", count, _HEADER.size)
    ends = np.append(offsets[1:], np.uint64(shard_bytes))
    # Compared without a difference, which would wrap around.
    if count and ((offsets % BLOCK_BYTES).any() or (offsets >= ends).any()):
        number = int(np.argmax((offsets % BLOCK_BYTES > 0) | (offsets >= ends)))
        raise wrong_index(path, f"sample {number} would be at byte {offsets[number]}")
    return offsets


def wrong_index(path: str, detail: str) -> TFRecordError:
    """The error for an index that does not describe its tar."""
    return TFRecordError(
        f"{path}{INDEX_SUFFIX} does not belong to {path} ({detail}); delete the index, it is built "
        "again on the next use"
    )
