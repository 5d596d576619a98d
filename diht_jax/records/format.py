"""The bytes of a TFRecord shard and of its index: framing, checksums, and errors.

The framing is TensorFlow's, little-endian::

    uint64 length | uint32 masked CRC32C of length | bytes | uint32 masked CRC32C of bytes

The index `SHARD.idx` is ours; its header ties it to one shard::

    8 bytes "DIHTIDX1" | uint64 shard size | uint64 n | n x uint64 offset

It needs no checksum: every read compares a record's frame with both of its offsets.
"""

from __future__ import annotations

import os
import pathlib
import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np

from diht_jax.storage.files import read_bytes, write_bytes
from diht_jax.storage.stores import is_remote, open_file

INDEX_SUFFIX = ".idx"

_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")
FRAME_BYTES = _LENGTH.size + _CRC.size
_INDEX_MAGIC = b"DIHTIDX1"
_INDEX_HEADER = struct.Struct("<8sQQ")
_MASK_DELTA = 0xA282EAD8


class TFRecordError(ValueError):
    """A shard or its index cannot be trusted; the message names file and record."""


class DamagedRecordError(TFRecordError):
    """One record is damaged; those around it can be read."""


def masked_crc(data: bytes) -> int:
    """CRC32C of the data, masked as the TFRecord format wants it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame_header(length: int) -> bytes:
    """The 12 bytes before a record of `length` bytes."""
    packed = struct.pack("<Q", length)
    return packed + _CRC.pack(masked_crc(packed))


def frame_footer(data: bytes) -> bytes:
    """The 4 bytes after a record."""
    return _CRC.pack(masked_crc(data))


def unframe(frame: bytes, path: str, record: int) -> bytes | None:
    """The record within a complete frame.

    Args:
        frame: header, record and footer, nothing else.
        path: of the shard, for the message.
        record: number within the shard, for the message.

    Returns:
        The record's bytes; None where `frame` is not one whole frame, so that whoever cut it out
        gave a wrong offset.

    Raises:
        TFRecordError: the frame is whole but its contents are damaged.
    """
    if len(frame) < FRAME_BYTES:
        return None
    length, length_crc = _LENGTH.unpack_from(frame)
    if masked_crc(frame[:8]) != length_crc or length != len(frame) - FRAME_BYTES:
        return None
    data = frame[_LENGTH.size : -_CRC.size]
    _check_contents(path, record, data, frame[-_CRC.size :])
    return data


def framed_length(header: bytes) -> int | None:
    """Bytes of the frame that begins with `header`; None where its checksum is wrong."""
    if len(header) < _LENGTH.size:
        return None
    length, crc = _LENGTH.unpack_from(header)
    return length + FRAME_BYTES if masked_crc(header[:8]) == crc else None


def scan_offsets(path: str | os.PathLike[str]) -> np.ndarray:
    """Walks through a shard from length to length; contents of a local one are not read.

    Args:
        path: of the shard, or its URL.

    Returns:
        uint64 [n], where each record's frame starts.

    Raises:
        TFRecordError: not a TFRecord file, or cut off, or damaged between two records.
    """
    path = os.fspath(path)
    offsets, position = [], 0
    with open_file(path) if is_remote(path) else open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        while position < size:
            file.seek(position)
            header = file.read(_LENGTH.size)
            end = position + FRAME_BYTES + _check_header(path, len(offsets), header)
            if end > size:
                raise _truncated(path, len(offsets), end - size)
            offsets.append(position)
            position = end
    return np.array(offsets, np.uint64)


def read_records(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the records of one shard in order, checksums checked; needs no index.

    Args:
        path: of the shard.

    Raises:
        TFRecordError: as `scan_offsets`, and for a record whose checksum differs.
        StorageError: the file cannot be read, now and after some attempts.
    """
    name, record, position = os.fspath(path), 0, 0
    with open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        while header := file.read(_LENGTH.size):
            length = _check_header(name, record, header)
            position += FRAME_BYTES + length
            if position > size:
                raise _truncated(name, record, position - size)
            data = file.read(length)
            _check_contents(name, record, data, file.read(_CRC.size))
            yield data
            record += 1


def index_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """Where the index of a shard lies."""
    return pathlib.Path(os.fspath(path) + INDEX_SUFFIX)


def write_index(path: str | os.PathLike[str], offsets: np.ndarray, shard_bytes: int) -> None:
    """Writes the index of a shard next to it.

    Args:
        path: of the shard, or its URL.
        offsets: uint64 [n], as `scan_offsets` gives.
        shard_bytes: size of the shard that the offsets belong to.
    """
    write_bytes(os.fspath(path) + INDEX_SUFFIX, encode_index(offsets, shard_bytes))


def encode_index(offsets: np.ndarray, shard_bytes: int) -> bytes:
    """The contents of an index; see `write_index`."""
    header = _INDEX_HEADER.pack(_INDEX_MAGIC, shard_bytes, len(offsets))
    return header + offsets.astype("<u8").tobytes()


def read_stored_index(url: str, shard_bytes: int) -> np.ndarray | None:
    """The offsets of the index next to a shard in a store; None where there is none.

    Raises:
        TFRecordError: the index is damaged or another shard's.
    """
    try:
        data = read_bytes(url + INDEX_SUFFIX)
    except FileNotFoundError:
        return None
    return decode_index(url, data, shard_bytes)


def decode_index(path: str, data: bytes, shard_bytes: int) -> np.ndarray:
    """The offsets of an index that has been read whole.

    Args:
        path: of the shard, for messages.
        data: contents of the index.
        shard_bytes: size of the shard, which the index must confirm.

    Raises:
        TFRecordError: the index is damaged or another shard's.
    """
    count, expected_bytes = _check_index_header(path, data[: _INDEX_HEADER.size], len(data))
    if expected_bytes != shard_bytes:
        raise wrong_index(
            path, f"it was made for {expected_bytes} bytes, the shard has {shard_bytes}"
        )
    offsets = np.frombuffer(data, "<u8", count, _INDEX_HEADER.size)
    return _check_offsets(path, offsets, shard_bytes)


def read_index_count(path: str, shard_bytes: int) -> int | None:
    """The number of records according to the index; None where there is none.

    Args:
        path: of the shard.
        shard_bytes: its size, which the index must confirm.

    Raises:
        TFRecordError: the index is damaged or another shard's, or the shard is cut off.
    """
    try:
        with open(index_path(path), "rb") as file:
            data = file.read(_INDEX_HEADER.size)
            index_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return None
    count, expected_bytes = _check_index_header(path, data, index_bytes)
    if expected_bytes != shard_bytes:
        # A shard that was cut off has the right index: the scan finds that and raises.
        scan_offsets(path)
        raise wrong_index(
            path, f"it was made for {expected_bytes} bytes, the shard has {shard_bytes}"
        )
    return count


def load_offsets(path: str, shard_bytes: int) -> np.ndarray | None:
    """The offsets, memory-mapped: processes that read the same shards share the pages.

    Args:
        path: of the shard.
        shard_bytes: its size, which the index must confirm.

    Returns:
        uint64 [n]; None where there is no index.

    Raises:
        TFRecordError: the index is damaged or another shard's, or the shard is cut off.
    """
    count = read_index_count(path, shard_bytes)
    if count is None:
        return None
    if not count:
        return np.zeros(0, np.uint64)
    offsets = np.memmap(
        index_path(path), dtype="<u8", mode="r", offset=_INDEX_HEADER.size, shape=(count,)
    )
    return _check_offsets(path, offsets, shard_bytes)


def wrong_index(path: str, detail: str) -> TFRecordError:
    """The error for an index that does not describe its shard."""
    return TFRecordError(
        f"{path}{INDEX_SUFFIX} does not belong to {path} ({detail}); delete the index, it is built "
        "again on the next use"
    )


def _check_index_header(path: str, header: bytes, index_bytes: int) -> tuple[int, int]:
    """Number of records and size of the shard that an index states."""
    if len(header) < _INDEX_HEADER.size or not header.startswith(_INDEX_MAGIC):
        raise wrong_index(path, "it has no valid header")
    _, shard_bytes, count = _INDEX_HEADER.unpack(header)
    if index_bytes != _INDEX_HEADER.size + 8 * count:
        raise wrong_index(path, f"its size is not that of an index of {count} records")
    if bool(count) != bool(shard_bytes):
        raise wrong_index(path, f"it has {count} records for {shard_bytes} bytes")
    return count, shard_bytes


def _check_offsets(path: str, offsets: np.ndarray, shard_bytes: int) -> np.ndarray:
    """Rejects offsets at which no record can lie: a read there could request any size."""
    if not len(offsets):
        return offsets
    if offsets[0] != 0:
        raise wrong_index(path, "the first record does not begin the shard")
    ends = np.append(offsets[1:], np.uint64(shard_bytes))
    # Compared without a difference, which would wrap around.
    if (ends < FRAME_BYTES).any() or (offsets > ends - np.uint64(FRAME_BYTES)).any():
        number = int(np.argmax((ends < FRAME_BYTES) | (offsets > ends - np.uint64(FRAME_BYTES))))
        raise wrong_index(path, f"record {number} would be at byte {offsets[number]}")
    return offsets


def _check_header(path: str, record: int, header: bytes) -> int:
    """The length that a frame header states."""
    if len(header) == _LENGTH.size:
        length, crc = _LENGTH.unpack(header)
        if masked_crc(header[:8]) == crc:
            return length
    if record == 0:
        kind = "compressed with gzip" if header.startswith(b"\x1f\x8b") else "not a TFRecord file"
        raise TFRecordError(
            f"{path}: record 0: the file is {kind}; expected an uncompressed TFRecord shard"
        )
    if len(header) < _LENGTH.size:
        raise _truncated(path, record, _LENGTH.size - len(header))
    raise TFRecordError(
        f"{path}: record {record}: its length is damaged (the checksum differs), so that nothing "
        "after it can be found; write the shard again"
    )


def _check_contents(path: str, record: int, data: bytes, footer: bytes) -> None:
    if frame_footer(data) != footer:
        raise DamagedRecordError(
            f"{path}: record {record} is damaged (its checksum differs); write the shard again"
        )


def _truncated(path: str, record: int, missing_bytes: int) -> TFRecordError:
    return TFRecordError(
        f"{path}: record {record} is truncated ({missing_bytes} bytes are missing at the end of "
        "the file); write or copy the shard again"
    )
