"""TFRecord shards: a writer, and random access over many shards.

What a record holds belongs in `schema.py`, the bytes around it in `format.py`.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import io
import os
import pathlib
import re
from collections.abc import Sequence
from concurrent import futures

import numpy as np

from diht_jax.data.atomic_file import temporary_path
from diht_jax.data.records import schema
from diht_jax.data.records.format import (
    FRAME_BYTES,
    DamagedRecordError,
    TFRecordError,
    frame_footer,
    frame_header,
    framed_length,
    index_path,
    load_offsets,
    read_index_count,
    read_records,
    scan_offsets,
    unframe,
    write_index,
    wrong_index,
)
from diht_jax.data.records.remote import RemoteShard, count_records, is_remote, list_files
from diht_jax.data.records.sharded import ShardedRecords
from diht_jax.data.retries import retry

__all__ = [
    "DamagedRecordError",
    "TFRecordError",
    "TFRecordSource",
    "TFRecordWriter",
    "block_starts",
    "find_shards",
    "is_shard",
    "read_records",
]

_MAX_OPEN_SHARDS = (
    128  # two descriptors each, of local ones: well under the usual limit of 1024 for a process
)
_OPENING_THREADS = 16  # counting the records of many shards waits for the file system

# Both `name-00000.tfrecord` and TFDS's default `name.tfrecord-00000-of-00010`.
_SHARD_NAME = re.compile(r"[^.].*\.tfrecord(-\d{5,}(-of-\d{5,})?)?")


class TFRecordWriter:
    """Writes one shard and its index; both appear at `close`, or not at all.

    Use it as a context manager: leaving normally closes, leaving by an exception discards.
    Bytes go to a temporary name in the same folder, are synced to disk and then renamed, so that
    a reader never sees half a shard.
    """

    def __init__(self, path: str | os.PathLike[str]):
        """Opens the temporary file.

        Args:
            path: of the shard; its folder must exist.
        """
        self.path = pathlib.Path(path)
        self._offsets: list[int] = []
        self._position = 0
        self._temporary = temporary_path(self.path)
        self._file = open(self._temporary, "xb")  # noqa: SIM115 - closed by close and discard

    def write(self, data: bytes) -> None:
        """Appends one record.

        Args:
            data: the record, such as `schema.encode_record` gives.
        """
        header, footer = frame_header(len(data)), frame_footer(data)
        self._file.write(header)
        self._file.write(data)
        self._file.write(footer)
        self._offsets.append(self._position)
        self._position += len(header) + len(data) + len(footer)

    def __len__(self) -> int:
        """Records written so far."""
        return len(self._offsets)

    def close(self) -> None:
        """Syncs and renames; a second call does nothing."""
        if self._file.closed:
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            # An old index must not stand beside the new shard, not even for a moment.
            index_path(self.path).unlink(missing_ok=True)
            os.replace(self._temporary, self.path)
        except BaseException:
            self.discard()
            raise
        write_index(self.path, np.array(self._offsets, np.uint64), self._position)

    def discard(self) -> None:
        """Throws away what was written; nothing is left on disk."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> TFRecordWriter:
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            self.close()
        else:
            self.discard()


class TFRecordSource(ShardedRecords):
    """Random access to the records of many shards, in the order of the shards.

    A grain `RandomAccessDataSource`: it can be pickled, shared by threads (every read carries its
    own offset) and inherited by forks; the number of open files is bounded, whatever the number
    of shards. Missing indices are built, and kept beside the shards where the folder can be
    written, in memory where it cannot.
    """

    def __init__(self, paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]):
        """Finds the shards and counts their records.

        Args:
            paths: a shard, a folder of shards, a glob, or a list of any of them; also their URLs
                in an object store.

        Raises:
            ValueError: nothing is found, or (`TFRecordError`) a shard or an index is broken.
        """
        self.paths = find_shards(paths)
        with futures.ThreadPoolExecutor(_OPENING_THREADS) as pool:
            counted = list(pool.map(_count_records, self.paths))
        self._starts = np.cumsum([0] + [count for count, _, _ in counted], dtype=np.int64)
        self._offsets_in_memory = {
            number: offsets for number, (_, _, offsets) in enumerate(counted) if offsets is not None
        }
        identity = [
            f"{os.path.basename(path)} {count} {size}"
            for path, (count, size, _) in zip(self.paths, counted, strict=True)
        ]
        self._digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
        self._reset_open_shards()

    def __getitem__(self, index: int) -> bytes:
        """The bytes of one record.

        Args:
            index: in [0, len).

        Raises:
            IndexError: the index is negative or too large.
            TFRecordError: the record is damaged, or the index beside its shard is another's.
        """
        number, record = self._find(index)
        return self._open_shard(number).read(record)

    @property
    def shard_lengths(self) -> np.ndarray:
        """int64 [shards]: how many records each shard has."""
        return np.diff(self._starts)

    def block_starts(self, block_records: int) -> np.ndarray:
        """See the function of this name, for the shards of this source."""
        return block_starts(self.shard_lengths, block_records)

    def describe_shard(self, number: int, end_bytes: int) -> tuple[int, np.ndarray, bytes, bytes]:
        """Identifies every shard without reading all of it.

        Args:
            number: of the shard, from 0.
            end_bytes: how much to read at either end of it.

        Returns:
            Size in bytes; uint64 [n], where its records begin; its first and its last bytes.
        """
        # Not through the cache: a look at all shards would throw out those that are being read.
        shard = _open_shard(self.paths, self._offsets_in_memory, number)
        tail_start = max(0, shard.size - end_bytes)
        head, tail = shard.read_range(0, end_bytes), shard.read_range(tail_start, shard.size)
        return shard.size, shard.offsets, head, tail

    def extent(self, first: int, last: int) -> tuple[str, int, int]:
        """Where the records [first, last) of one shard lie: one ranged request brings them.

        Args:
            first, last: in [0, len), of the same shard.

        Returns:
            Path of the shard, first byte, end.

        Raises:
            IndexError: there is no such record, or they do not lie in one shard.
        """
        number, begin, end = self._find_range(first, last)
        shard = self._open_shard(number)
        start, stop = shard.extent(begin)[0], shard.extent(end - 1)[1]
        return self.paths[number], start, stop

    def cut(self, first: int, last: int, data: bytes) -> np.ndarray:
        """Where each record lies in the bytes of an extent.

        Args:
            first, last: of the extent.
            data: its bytes.

        Returns:
            int64 [last - first + 1], where each record's piece begins; the last entry is its end.

        Raises:
            TFRecordError: these are not the bytes of the extent.
        """
        number, begin, end = self._find_range(first, last)
        starts = [0]
        while len(starts) <= last - first:
            length = framed_length(data[starts[-1] : starts[-1] + FRAME_BYTES])
            if length is None or starts[-1] + length > len(data):
                break
            starts.append(starts[-1] + length)
        if len(starts) == last - first + 1 and starts[-1] == len(data):
            return np.array(starts, np.int64)
        # A damaged length: only the index knows where the next record begins.
        shard = self._open_shard(number)
        ends = [shard.extent(record)[1] for record in range(begin, end)]
        starts = np.array([shard.extent(begin)[0], *ends], np.int64)
        if starts[-1] - starts[0] != len(data):
            raise TFRecordError(
                f"{self.paths[number]}: records {begin} to {end - 1}: {len(data)} bytes were read, "
                f"and {starts[-1] - starts[0]} expected; the shard was replaced or cut off"
            )
        return starts - starts[0]

    def unpack(self, index: int, piece: bytes) -> bytes:
        """The element of a record, of its piece of an extent.

        Args:
            index: in [0, len).
            piece: the bytes between two entries of `cut`.

        Raises:
            TFRecordError: the record is damaged.
        """
        path, record = self.locate(index)
        data = unframe(piece, path, record)
        if data is None:
            raise DamagedRecordError(
                f"{path}: record {record}: its length is damaged (the checksum differs), or it is "
                "not where its index says; write the shard again"
            )
        return data

    def split(self, first: int, last: int, data: bytes) -> list[bytes | TFRecordError]:
        """Cuts the bytes of an extent into elements.

        Args:
            first, last: of the extent.
            data: its bytes.

        Returns:
            What `self[n]` gives, for n in [first, last); the error that it raises where a record is
            damaged.

        Raises:
            TFRecordError: these are not the bytes of the extent.
        """
        starts, elements = self.cut(first, last, data), []
        for number in range(last - first):
            try:
                piece = data[starts[number] : starts[number + 1]]
                elements.append(self.unpack(first + number, piece))
            except TFRecordError as error:
                elements.append(error)
        return elements

    @staticmethod
    def decode(element: bytes) -> schema.Record:
        """The record of an element; errors as of `schema.decode_record`."""
        return schema.decode_record(element)

    def __repr__(self) -> str:
        # Grain compares it when it restores an iterator: the same data must give the same text,
        # wherever the folder lies.
        return (
            f"TFRecordSource(shards={len(self.paths)}, records={len(self)}, digest={self._digest})"
        )

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_open_shard"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset_open_shards()

    def _reset_open_shards(self) -> None:
        # The cache locks in C, under the interpreter's lock: there is no lock of ours that a fork
        # could inherit locked. A shard that falls out is closed when its last reader is done.
        # It must not refer to this object: as a cycle, it would keep files open for long.
        self._open_shard = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(
            functools.partial(_open_shard, self.paths, self._offsets_in_memory)
        )


def _open_shard(
    paths: list[str], in_memory: dict[int, np.ndarray], number: int
) -> _Shard | RemoteShard:
    return (RemoteShard if is_remote(paths[number]) else _Shard)(
        paths[number], in_memory.get(number)
    )


class _Shard:
    """One open shard with its offsets; closed by the garbage collector."""

    def __init__(self, path: str, offsets: np.ndarray | None):
        self._path = path
        self._file = retry(self._open, path)
        self.size = os.fstat(self._file.fileno()).st_size
        if offsets is None:
            offsets = load_offsets(path, self.size)
        self.offsets = scan_offsets(path) if offsets is None else offsets

    def read(self, record: int) -> bytes:
        if record >= len(self.offsets):
            raise wrong_index(self._path, f"record {record}: the shard or its index was replaced")
        data = unframe(self.read_range(*self.extent(record)), self._path, record)
        if data is None:
            raise self._explain(record)
        return data

    def read_range(self, start: int, end: int) -> bytes:
        return retry(lambda: self._read_once(start, end), self._path)

    def _read_once(self, start: int, end: int) -> bytes:
        file = self._file  # held here, so that another thread that opens it again does not close it
        try:
            return os.pread(file.fileno(), max(0, end - start), start)
        except OSError:
            # The descriptor of a file server that was started again stays stale.
            self._file = self._open()
            raise

    def _open(self) -> io.FileIO:
        return open(self._path, "rb", buffering=0)  # lives as long as the object

    def extent(self, record: int) -> tuple[int, int]:
        """First byte and end of a record's frame."""
        is_last = record + 1 == len(self.offsets)
        return int(self.offsets[record]), self.size if is_last else int(self.offsets[record + 1])

    def _explain(self, record: int) -> TFRecordError:
        """Tells a damaged length from a broken shard and from an index of another one."""
        beside = [n for n in (record - 1, record + 1) if 0 <= n < len(self.offsets)]
        # A frame of another length where the index has one: then it is the index that is wrong.
        is_damaged = self._framed_length(record) is None
        if is_damaged and beside and all(map(self._has_frame, beside)):
            return DamagedRecordError(
                f"{self._path}: record {record}: its length is damaged (the checksum differs); "
                "write the shard again"
            )
        try:
            scan_offsets(self._path)
        except TFRecordError as error:
            return error
        return wrong_index(self._path, f"record {record} is not where the index says")

    def _has_frame(self, record: int) -> bool:
        start, end = self.extent(record)
        return self._framed_length(record) == end - start

    def _framed_length(self, record: int) -> int | None:
        start, _ = self.extent(record)
        return framed_length(self.read_range(start, min(self.size, start + FRAME_BYTES)))


def block_starts(shard_lengths: np.ndarray, block_records: int) -> np.ndarray:
    """Where blocks of consecutive records begin, none of which crosses the end of a shard.

    Within a shard they begin at multiples of `block_records`. What is left at its end, if less than
    half a block, joins the block before.

    Args:
        shard_lengths: int [shards], how many records each has.
        block_records: K, the usual length of a block.

    Returns:
        int64 [B + 1]: the first record of each block; the last entry is the number of records.
    """
    lengths = np.asarray(shard_lengths, np.int64)
    whole, left = np.divmod(lengths, block_records)
    counts = whole + ((left > 0) & ((2 * left >= block_records) | (whole == 0)))
    within_shard = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = np.repeat(np.cumsum(lengths) - lengths, counts) + within_shard * block_records
    return np.append(starts, lengths.sum())


def find_shards(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> list[str]:
    """Resolves a shard, a folder, a glob or a list of them to shard paths.

    Args:
        paths: what to look for. A folder stands for its `*.tfrecord` and `*.tfrecord-*` files.
            URLs such as `gs://bucket/folder` are looked for in their object store.

    Returns:
        Paths, sorted within each folder or glob, in the order of the list.

    Raises:
        ValueError: an entry matches no shard.
    """
    entries = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[str] = []
    for entry in map(os.fspath, entries):
        if os.path.isfile(entry):
            found.append(entry)
            continue
        if is_remote(entry):
            candidates = list_files(entry)
        elif os.path.isdir(entry):
            candidates = [os.path.join(entry, name) for name in os.listdir(entry)]
        else:
            candidates = glob.glob(entry, recursive=True)
        shards = sorted(filter(is_shard, candidates))
        if not shards:
            raise ValueError(
                f"no TFRecord shard at '{entry}'; expected a file, a folder of *.tfrecord files "
                "or a glob that matches some"
            )
        found.extend(shards)
    if not found:
        raise ValueError("no TFRecord shard: the list of paths is empty")
    return found


def is_shard(path: str) -> bool:
    """Whether a path is a file with the name of a TFRecord shard; a URL is taken at its name."""
    if not _SHARD_NAME.fullmatch(os.path.basename(path)):
        return False
    return is_remote(path) or os.path.isfile(path)


def _count_records(path: str) -> tuple[int, int, np.ndarray | None]:
    """Record count, size in bytes, and the offsets where they could not be written to disk."""
    if is_remote(path):
        return count_records(path)
    size = os.stat(path).st_size
    count = read_index_count(path, size)
    if count is not None:
        return count, size, None
    offsets = scan_offsets(path)
    with contextlib.suppress(OSError):
        write_index(path, offsets, size)
        return len(offsets), size, None
    return len(offsets), size, offsets
