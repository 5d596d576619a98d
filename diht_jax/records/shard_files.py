"""Files of record shards: names, TFRecord framing, the index of a shard, and the writer interface.

The framing is TensorFlow's, little-endian::

    uint64 length | uint32 masked CRC32C of length | bytes | uint32 masked CRC32C of bytes

The index of a shard is the file `SHARD.idx` next to it, which states where each record begins. It
is little-endian, and its header ties it to one shard::

    8 bytes magic | uint64 shard size | uint64 n | n x uint64 offset

The magic is "DIHTIDX1" for a TFRecord shard and "DIHTTAR1" for a tar. An index has no checksum,
since every read compares the record's own frame or header with its offsets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import struct
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from diht_jax.storage import files
from diht_jax.storage.files import read_bytes, write_bytes
from diht_jax.storage.stores import StorageError, is_remote, open_file, open_local, retry

# By kind, as named in `config.output_format`. A folder with several is read as the first one.
SUFFIXES = {"tfrecord": ".tfrecord", "array_record": ".array_record", "webdataset": ".tar"}
# Both `name-00000.tfrecord` and TFDS's default `name.tfrecord-00000-of-00010`.
_NAMES = {
    "tfrecord": re.compile(r"[^.].*\.tfrecord(-\d{5,}(-of-\d{5,})?)?"),
    "array_record": re.compile(r"[^.].*\.array_record(-\d{5,}(-of-\d{5,})?)?"),
    "webdataset": re.compile(r"[^.].*\.(?i:tar)"),
}
_DATASET_NAME = re.compile(r"[a-z][a-z0-9_]*")
INDEX_SUFFIX = ".idx"
_HEADER = struct.Struct("<8sQQ")
_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")
FRAME_BYTES = _LENGTH.size + _CRC.size
_MASK_DELTA = 0xA282EAD8


class TFRecordError(ValueError):
    """A damaged shard or index; the message names the file and the record."""


class DamagedRecordError(TFRecordError):
    """A single damaged record; the records around it can be read."""


def is_of_one_record(error: ValueError) -> bool:
    """Returns False for an error of a whole shard, or of its disk or store."""
    is_whole_shard = isinstance(error, TFRecordError | StorageError)
    return not is_whole_shard or isinstance(error, DamagedRecordError)


def kind_of(path: str) -> str | None:
    """Returns the kind of a shard from its file name; None if it is not a shard's name."""
    name = os.path.basename(path)
    for kind, form in _NAMES.items():
        if form.fullmatch(name):
            return kind
    return None


def shard_name(
    dataset: str, split: str, index: int, num_shards: int, suffix: str = ".tfrecord"
) -> str:
    """Returns the file name of one shard in TFDS's format; raises ValueError for invalid names.

    The names of data set and split must be lower case with underscores. `index` counts from 0. The
    number is longer for more than 99,999 shards.
    """
    for name in (dataset, split):
        if not _DATASET_NAME.fullmatch(name):
            raise ValueError(f"name '{name}': expected lower-case letters, digits and underscores")
    digits = max(5, len(str(num_shards)))
    return f"{dataset}-{split}-{index:0{digits}d}{suffix}"


def _masked_crc(data: bytes) -> int:
    """Returns the CRC32C of the data, masked as the TFRecord format requires."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame_header(length: int) -> bytes:
    """Returns the 12 bytes before a record of `length` bytes."""
    packed = struct.pack("<Q", length)
    return packed + _CRC.pack(_masked_crc(packed))


def frame_footer(data: bytes) -> bytes:
    """Returns the 4 bytes after a record."""
    return _CRC.pack(_masked_crc(data))


def unframe(frame: bytes, locate: Callable[[], tuple[str, int]]) -> bytes | None:
    """Returns the record in a complete frame; `locate` gives path and number for the message.

    Returns:
        The record's bytes. None if `frame` is not one whole frame, which means that the offset was
        wrong.

    Raises:
        TFRecordError: the frame is whole but its contents are damaged.
    """
    if framed_length(frame) != len(frame):
        return None
    data = frame[_LENGTH.size : -_CRC.size]
    if frame_footer(data) != frame[-_CRC.size :]:
        raise _damaged(*locate())
    return data


def framed_length(header: bytes) -> int | None:
    """Returns the bytes of the frame that begins with `header`; None if its checksum is wrong."""
    if len(header) < _LENGTH.size:
        return None
    length, crc = _LENGTH.unpack_from(header)
    return length + FRAME_BYTES if _masked_crc(header[:8]) == crc else None


def scan_offsets(path: str | os.PathLike[str]) -> np.ndarray:
    """Finds where each record's frame starts, uint64 [n]; skips the contents of a local shard.

    Raises:
        TFRecordError: the file is not a TFRecord file, is cut off, or is damaged between records.
        StorageError: the file cannot be read, even after retries.
    """
    path = os.fspath(path)

    def scan() -> np.ndarray:
        with open_file(path) if is_remote(path) else open_local(path) as file:
            return np.array([start for start, _ in _walk_frames(path, file)], np.uint64)

    return retry(scan, path)


def read_records(path: str | os.PathLike[str]) -> Iterator[bytes]:
    """Yields the records of one shard in order and checks their checksums; needs no index.

    Raises:
        TFRecordError: like `scan_offsets`, and for a record with a wrong checksum.
        StorageError: the file cannot be read, even after retries.
    """
    path = os.fspath(path)
    with open_file(path) as file:
        for record, (_, length) in enumerate(_walk_frames(path, file)):
            data = file.read(length)
            if frame_footer(data) != file.read(_CRC.size):
                raise _damaged(path, record)
            yield data


def _walk_frames(path: str, file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yields the start of each frame and the length of its record, with the file at the record."""
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
    """Returns the record length that a frame header states."""
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


def _damaged(path: str, record: int) -> DamagedRecordError:
    return DamagedRecordError(
        f"{path}: record {record} is damaged (its checksum differs); write the shard again"
    )


def _truncated(path: str, record: int, missing_bytes: int) -> TFRecordError:
    return TFRecordError(
        f"{path}: record {record} is truncated ({missing_bytes} bytes are missing at the end of "
        "the file); write or copy the shard again"
    )


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """Reads and writes the indices of shards of one format."""

    magic: bytes  # the first 8 bytes
    record_bytes: int  # minimum size of a record
    alignment: int  # records begin at multiples of this
    is_gapless: bool  # whether the records fill the shard
    # Finds the offsets of a shard, uint64 [n], without an index; raises `TFRecordError` for a
    # damaged shard.
    scan: Callable[[str], np.ndarray]

    def load(self, path: str, shard_bytes: int) -> np.ndarray | None:
        """Returns the offsets from the index of a shard, uint64 [n]; None if there is no index.

        A local index is memory-mapped, so processes that read the same shards share the memory.

        Raises:
            TFRecordError: the index is damaged or another shard's, or the shard is cut off.
        """
        try:
            if is_remote(path):
                data = np.frombuffer(read_bytes(path + INDEX_SUFFIX), np.uint8)
            elif os.path.getsize(path + INDEX_SUFFIX):
                data = np.memmap(path + INDEX_SUFFIX, np.uint8, "r")
            else:  # an empty file cannot be mapped
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
            # If the shard was cut off and the index is right, the scan raises that error.
            self.scan(path)
            raise wrong_index(
                path, f"it was made for {expected_bytes} bytes, the shard has {shard_bytes}"
            )
        offsets = data[_HEADER.size :].view("<u8")
        if self.is_gapless and count and offsets[0] != 0:
            raise wrong_index(path, "the first record does not begin the shard")
        # With an impossible offset, a read could request any size.
        bounds = np.append(offsets, np.uint64(shard_bytes)).astype(np.int64)
        is_wrong = (np.diff(bounds) < self.record_bytes) | (bounds[:-1] < 0)
        is_wrong |= bounds[:-1] % self.alignment > 0
        if is_wrong.any():
            number = int(np.argmax(is_wrong))
            raise wrong_index(path, f"record {number} would be at byte {offsets[number]}")
        return offsets

    def find(self, path: str, shard_bytes: int) -> np.ndarray:
        """Returns the offsets of a shard, from its index or by a scan; writes nothing."""
        offsets = self.load(path, shard_bytes)
        return self.scan(path) if offsets is None else offsets

    def write(self, path: str, offsets: np.ndarray, shard_bytes: int) -> None:
        """Writes the index of a shard."""
        header = _HEADER.pack(self.magic, shard_bytes, len(offsets))
        write_bytes(path + INDEX_SUFFIX, header + offsets.astype("<u8").tobytes())


def wrong_index(path: str, detail: str) -> TFRecordError:
    """Returns the error for an index that does not describe its shard."""
    return TFRecordError(
        f"{path}{INDEX_SUFFIX} does not belong to {path} ({detail}); delete the index, it is built "
        "again on the next use"
    )


@dataclasses.dataclass
class RecordHash:
    """A hash of records in order, which does not depend on the shard format."""

    _hash: Any = dataclasses.field(
        default_factory=functools.partial(hashlib.blake2b, digest_size=16)
    )

    def update(self, data: bytes) -> None:
        """Adds one record."""
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def digest(self) -> str:
        """Returns the hash of all records so far."""
        return self._hash.hexdigest()


class RecordWriter:
    """Writes one shard, local or in a store; use it as a context manager.

    A normal exit closes the shard, an exception discards it. Bytes go to a temporary file, so a
    reader never sees half a shard. Subclasses implement `_open`, `_append` and `_finish`.

    Attributes:
        path: path or URL of the shard.
        hash: updated with every written record; None by default.
    """

    index: ShardIndex | None = None  # if set, `_append` must record the offsets
    hash: RecordHash | None = None

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the temporary file."""
        self.path = os.fspath(path)
        self._output = contextlib.ExitStack()
        self._local = self._output.enter_context(files.local_output(self.path))
        self._offsets: list[int] = []
        self._count = 0
        self._is_open = True
        self._open(self._local)

    def write(self, data: bytes) -> None:
        """Appends one record, such as the result of `schema.encode_record`."""
        self._append(data)
        self._count += 1
        if self.hash is not None:
            self.hash.update(data)

    def __len__(self) -> int:
        """Returns the number of records written so far."""
        return self._count

    def close(self) -> None:
        """Gives the shard its final name and writes its index; a second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        with self._output:
            self._finish()
            size = self._local.stat().st_size
            if self.index is not None:
                # An old index must never exist next to the new shard.
                files.remove(self.path + INDEX_SUFFIX)
        if self.index is not None:
            self.index.write(self.path, np.array(self._offsets, np.uint64), size)

    def discard(self, error: BaseException | None = None) -> None:
        """Deletes everything that was written.

        `error` is the reason; an OSError without a file name is raised again with the shard's name.
        """
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(OSError):  # errors of discarded bytes do not matter
            self._finish()
        error = error or RuntimeError("discarded")  # keeps the output from being renamed
        self._output.__exit__(type(error), error, error.__traceback__)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, _: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard(error)

    def _open(self, path: pathlib.Path) -> None:
        """Opens a new file at this path."""
        raise NotImplementedError

    def _append(self, data: bytes) -> None:
        """Writes a record to the file."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Completes and closes the file; a second call does nothing."""
        raise NotImplementedError
