"""Shards, indices, `tf.train.Example`s and PNGs, written by hand from their specifications.

Independent of the code under test.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c


def _masked_crc(data: bytes) -> bytes:
    """Returns the four bytes of TFRecord's masked checksum."""
    crc = google_crc32c.value(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def frame(data: bytes, length: int | None = None) -> bytes:
    """Returns one framed record; another `length` has a valid checksum but is wrong."""
    header = struct.pack("<Q", len(data) if length is None else length)
    return header + _masked_crc(header) + data + _masked_crc(data)


def index(frames: Sequence[bytes], shard_bytes: int | None = None) -> bytes:
    """Returns the index of a shard that consists of these frames."""
    offsets = [sum(map(len, frames[:number])) for number in range(len(frames))]
    size = sum(map(len, frames)) if shard_bytes is None else shard_bytes
    return struct.pack(f"<8sQQ{len(frames)}Q", b"DIHTIDX1", size, len(frames), *offsets)


def dataset_index(
    shards: Mapping[str, Sequence[bytes]], digests: Sequence[int]
) -> tuple[bytes, bytes]:
    """Returns head and offsets of the `dataset.index` of shards that consist of these frames."""
    offsets = [
        [sum(map(len, frames[:n])) for n in range(len(frames))] for frames in shards.values()
    ]
    anchors = [at for own in offsets for at in own[::64]]
    names = b"".join(name.encode() + b"\0" for name in shards)
    counts, sizes = zip(*((len(fs), sum(map(len, fs))) for fs in shards.values()), strict=True)
    facts = {"shards": len(shards), "records": sum(counts), "anchors": len(anchors)}
    facts |= {"names_bytes": len(names), "kinds": ["tfrecord"]}
    text = json.dumps(facts, sort_keys=True).encode()
    words = [*counts, *sizes, *digests, *anchors]
    arrays = struct.pack(f"<{len(words)}Q", *words) + bytes(len(shards)) + names
    head = struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)
    head += arrays + bytes(-len(arrays) % 8)
    every = [at for own in offsets for at in own]
    return head, struct.pack(f"<{len(every)}Q", *every)


def with_preamble(head: bytes) -> bytes:
    """Prepends length and checksum to the head of a `dataset.index`."""
    return struct.pack("<8sQII", b"DIHTSET1", len(head), google_crc32c.value(head), 0) + head


def example(fields: Mapping[str | bytes, Any]) -> bytes:
    """Returns a `tf.train.Example` of bytes, ints or floats, or of lists of one of them."""
    entries = b"".join(
        _field(1, _field(1, name if isinstance(name, bytes) else name.encode()) + _field(2, value))
        for name, value in ((name, feature(value)) for name, value in fields.items())
    )
    return _field(1, entries)


def feature(value: Any) -> bytes:
    """Returns a `tf.train.Feature`."""
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


def png(
    width: int, height: int, data: bytes, *chunks: bytes, depth: int = 8, colour_type: int = 2
) -> bytes:
    """Returns a PNG with this compressed data, and with other chunks before it."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name: bytes, data: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
