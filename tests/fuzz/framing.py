"""TFRecord shards, indices and `tf.train.Example`s, written byte by byte from their specifications.

Independent of the code under test: CRC32C by its polynomial, protobuf by its wire format.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

_POLYNOMIAL = 0x82F63B78  # of Castagnoli, reflected


def _make_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _make_table()


def masked_crc(data: bytes) -> bytes:
    """The four bytes that TFRecord keeps of a checksum."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def frame(data: bytes, length: int | None = None) -> bytes:
    """One record with its length (or another, with a right checksum) and checksums."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return header + masked_crc(header) + data + masked_crc(data)


def index(frames: Sequence[bytes], shard_bytes: int | None = None) -> bytes:
    """The index of a shard that is made of these frames."""
    offsets = [sum(map(len, frames[:number])) for number in range(len(frames))]
    size = sum(map(len, frames)) if shard_bytes is None else shard_bytes
    return struct.pack(f"<8sQQ{len(frames)}Q", b"DIHTIDX1", size, len(frames), *offsets)


def example(fields: Mapping[str | bytes, Any]) -> bytes:
    """A `tf.train.Example` of bytes, ints or floats, or of lists of one of them."""
    entries = b"".join(
        _field(1, _field(1, name if isinstance(name, bytes) else name.encode()) + _field(2, value))
        for name, value in ((name, feature(value)) for name, value in fields.items())
    )
    return _field(1, entries)


def feature(value: Any) -> bytes:
    """A `tf.train.Feature`."""
    values = value if isinstance(value, list) else [value]
    if all(isinstance(v, bytes) for v in values):
        return _field(1, b"".join(_field(1, v) for v in values))
    if any(isinstance(v, float) for v in values):
        return _field(2, _field(1, struct.pack(f"<{len(values)}f", *values)))
    return _field(3, _field(1, b"".join(_varint(v) for v in values)))


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    encoded = b""
    while value > 0x7F:
        encoded += bytes([value & 0x7F | 0x80])
        value >>= 7
    return encoded + bytes([value])
