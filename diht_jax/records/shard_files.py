"""Files of record shards: their names, TFRecord's framing, the index of a shard, its writer.

The framing is TensorFlow's, little-endian::

    uint64 length | uint32 masked CRC32C of length | bytes | uint32 masked CRC32C of bytes

The index is the file `SHARD.idx` next to a shard: where each of its records begins. It is
little-endian, and its header ties it to one shard::

    8 bytes magic | uint64 shard size | uint64 n | n x uint64 offset

The magic is "DIHTIDX1" of a TFRecord shard and "DIHTTAR1" of a tar. An index needs no checksum: a
record's own frame or header must fit its offsets when it is read.
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

# By kind, as `config.output_format` names it; of a folder with several the first one is read.
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
    """A shard or its index cannot be trusted; the message names file and record."""


class DamagedRecordError(TFRecordError):
    """One record is damaged; those around it can be read."""


def is_of_one_record(error: ValueError) -> bool:
    """False for the error of a whole shard, or of the disk or store that it is in."""
    is_whole_shard = isinstance(error, TFRecordError | StorageError)
    return not is_whole_shard or isinstance(error, DamagedRecordError)


def kind_of(path: str) -> str | None:
    """The kind of a shard by its name alone; None where it is no name of a shard."""
    name = os.path.basename(path)
    for kind, form in _NAMES.items():
        if form.fullmatch(name):
            return kind
    return None


def shard_name(
    dataset: str, split: str, index: int, num_shards: int, suffix: str = ".tfrecord"
) -> str:
    """File name of one shard, as TFDS forms it from our template; a ValueError for other names.

    Those of data set and split are lower case with underscores; `index` counts from 0, and more
    than 99,999 shards make the number longer.
    """
    for name in (dataset, split):
        if not _DATASET_NAME.fullmatch(name):
            raise ValueError(f"name '{name}': expected lower-case letters, digits and underscores")
    digits = max(5, len(str(num_shards)))
    return f"{dataset}-{split}-{index:0{digits}d}{suffix}"


def _masked_crc(data: bytes) -> int:
    """CRC32C of the data, masked as the TFRecord format wants it."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF


def frame_header(length: int) -> bytes:
    """The 12 bytes before a record of `length` bytes."""
    packed = struct.pack("<Q", length)
    return packed + _CRC.pack(_masked_crc(packed))


def frame_footer(data: bytes) -> bytes:
    """The 4 bytes after a record."""
    return _CRC.pack(_masked_crc(data))


def unframe(frame: bytes, locate: Callable[[], tuple[str, int]]) -> bytes | None:
    """The record within a complete frame; `locate` gives path and number for the message.

    Returns:
        The record's bytes; None where `frame` is not one whole frame, so that whoever cut it out
        gave a wrong offset.

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
    """Bytes of the frame that begins with `header`; None where its checksum is wrong."""
    if len(header) < _LENGTH.size:
        return None
    length, crc = _LENGTH.unpack_from(header)
    return length + FRAME_BYTES if _masked_crc(header[:8]) == crc else None


def scan_offsets(path: str | os.PathLike[str]) -> np.ndarray:
    """Where each record's frame starts, uint64 [n]; contents of a local shard are not read.

    Raises:
        TFRecordError: not a TFRecord file, or cut off, or damaged between two records.
        StorageError: it cannot be read, now and after some attempts.
    """
    path = os.fspath(path)

    def scan() -> np.ndarray:
        with open_file(path) if is_remote(path) else open_local(path) as file:
            return np.array([start for start, _ in _walk_frames(path, file)], np.uint64)

    return retry(scan, path)


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
            if frame_footer(data) != file.read(_CRC.size):
                raise _damaged(path, record)
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

    def find(self, path: str, shard_bytes: int) -> np.ndarray:
        """The offsets of a shard, from its index or by a scan; nothing is written."""
        offsets = self.load(path, shard_bytes)
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


@dataclasses.dataclass
class RecordHash:
    """A hash of records in their order; it is the same for every format."""

    _hash: Any = dataclasses.field(
        default_factory=functools.partial(hashlib.blake2b, digest_size=16)
    )

    def update(self, data: bytes) -> None:
        """Takes one record."""
        self._hash.update(len(data).to_bytes(8, "little"))
        self._hash.update(data)

    def digest(self) -> str:
        """Hash of all records so far."""
        return self._hash.hexdigest()


class RecordWriter:
    """Writes one shard, local or in a store; use it as a context manager.

    Leaving normally closes, leaving by an exception discards. Bytes go to a temporary file, so that
    a reader never sees half a shard. A format gives `_open`, `_append` and `_finish`.

    Attributes:
        path: of the shard, or its URL.
        hash: takes every record that is written; None by default.
    """

    index: ShardIndex | None = None  # of the format; its `_append` then notes the offsets
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
        """Appends one record, such as `schema.encode_record` gives."""
        self._append(data)
        self._count += 1
        if self.hash is not None:
            self.hash.update(data)

    def __len__(self) -> int:
        """Records written so far."""
        return self._count

    def close(self) -> None:
        """Gives the shard its name, and writes its index; a second call does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        with self._output:
            self._finish()
            size = self._local.stat().st_size
            if self.index is not None:
                # An old index must not stand next to the new shard, not even for a moment.
                files.remove(self.path + INDEX_SUFFIX)
        if self.index is not None:
            self.index.write(self.path, np.array(self._offsets, np.uint64), size)

    def discard(self, error: BaseException | None = None) -> None:
        """Throws away what was written; nothing is left.

        `error`, the reason, is raised with the name of the shard where it has none.
        """
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(OSError):  # of bytes that nobody wants
            self._finish()
        error = error or RuntimeError("discarded")  # so that the output does not get its name
        self._output.__exit__(type(error), error, error.__traceback__)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, error_type: object, error: BaseException | None, _: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard(error)

    def _open(self, path: pathlib.Path) -> None:
        """Opens a new file of this name."""
        raise NotImplementedError

    def _append(self, data: bytes) -> None:
        """Writes a record into it."""
        raise NotImplementedError

    def _finish(self) -> None:
        """Completes and closes it; a second call does nothing."""
        raise NotImplementedError
