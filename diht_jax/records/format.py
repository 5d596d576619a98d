"""The bytes of a TFRecord shard: framing, checksums, and errors.

The framing is TensorFlow's, little-endian::

    uint64 length | uint32 masked CRC32C of length | bytes | uint32 masked CRC32C of bytes
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import BinaryIO

import google_crc32c
import numpy as np

from diht_jax.storage.stores import is_remote, open_file, open_local

_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")
FRAME_BYTES = _LENGTH.size + _CRC.size
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
    """The record within a complete frame; `path` and `record` are for the message.

    Returns:
        The record's bytes; None where `frame` is not one whole frame, so that whoever cut it out
        gave a wrong offset.

    Raises:
        TFRecordError: the frame is whole but its contents are damaged.
    """
    if framed_length(frame) != len(frame):
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
    """Where each record's frame starts, uint64 [n]; contents of a local shard are not read.

    Raises:
        TFRecordError: not a TFRecord file, or cut off, or damaged between two records.
    """
    path = os.fspath(path)
    with open_file(path) if is_remote(path) else open_local(path) as file:
        return np.array([start for start, _ in _walk_frames(path, file)], np.uint64)


def read_records(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the records of one shard in order, checksums checked; needs no index.

    Raises:
        TFRecordError: like `scan_offsets`, and for a record whose checksum differs.
        StorageError: the file cannot be read, now and after some attempts.
    """
    path = os.fspath(path)
    with open_file(path) as file:
        for record, (_, length) in enumerate(_walk_frames(path, file)):
            data = file.read(length)
            _check_contents(path, record, data, file.read(_CRC.size))
            yield data


def _walk_frames(path: str, file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yields where each frame starts, and the length of its record, which the file is then at."""
    record, position, size = 0, 0, file.seek(0, os.SEEK_END)
    while position < size:
        file.seek(position)
        length = _check_header(path, record, file.read(_LENGTH.size))
        end = position + FRAME_BYTES + length
        if end > size:
            raise _truncated(path, record, end - size)
        yield position, length
        record, position = record + 1, end


def _check_header(path: str, record: int, header: bytes) -> int:
    """The length that a frame header states."""
    framed = framed_length(header)
    if framed is not None:
        return framed - FRAME_BYTES
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
