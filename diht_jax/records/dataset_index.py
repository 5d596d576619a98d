"""The index of a whole data set: the file `dataset.index` in the folder of its shards.

It states the name, records, bytes and digest of every shard, and where every record begins. All
numbers are little-endian::

    preamble   8 bytes "DIHTSET1" | uint64 bytes of the head | uint32 CRC32C of the head | uint32 0
    head       uint64 bytes of the JSON | JSON | zeros up to a multiple of 8
               uint64 records [shards] | uint64 bytes [shards] | uint64 digest [shards]
               uint64 anchors [anchors] | uint8 kind [shards] | names, each ended by a zero byte
               zeros up to a multiple of 8
    offsets    uint64 [records]

The JSON has the lengths of the arrays (`shards`, `records`, `anchors` and `names_bytes`) and
`kinds`, the names of the kind numbers. It may have `vocabulary`, that of the concepts of all
shards. An index of label shards also has `labels`, which states the record shards that they belong
to (`labels/shards.py`). Anchors are the offsets of the records 0, 64, 128, ... of every shard. With
them, the small head is enough to locate all blocks of a multiple of 64 records. A record ends where
the next one begins, the last one at the end of its shard. A shard's digest is the number written by
its 16 hex digits; see `digest_shard`.

The head is checked when it is read. The offsets may take gigabytes, so each is checked when it is
used: it must lie in its shard, and a record's own frame must fit both of its offsets.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np

from diht_jax.records.shard_files import TFRecordError
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.stores import RangesFile, is_remote

INDEX_NAME = "dataset.index"
ANCHOR_RECORDS = 64
END_BYTES = 4096  # of each end of a shard, covered by its digest

# Minimum bytes of a record by kind of shard: an empty frame, or the header of a tar's member.
# ArrayRecord shards use the numbers of the records as offsets.
KINDS = {"tfrecord": 16, "webdataset": 512, "array_record": 1}

_MAGIC = b"DIHTSET1"
_PREAMBLE = struct.Struct("<8sQII")
_LENGTH = struct.Struct("<Q")
_MAX_NUMBER = 2**61  # sums of offsets and lengths must fit into an int64
# Size of the first read: enough for the preamble and the head of some thousand shards.
_FIRST_READ_BYTES = 2**20
_MAX_HEAD_BYTES = 2**36


def digest_shard(offsets: np.ndarray, head: bytes, tail: bytes) -> str:
    """Returns 16 hex digits of a hash of a shard's record offsets, uint64 [n], and its two ends."""
    digest = hashlib.sha256(offsets.astype("<u8").tobytes())
    digest.update(head)
    digest.update(tail)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """The entry of one shard in the index, without its offsets."""

    name: str  # file name in the folder
    kind: str  # one of `KINDS`
    num_records: int  # number of records
    num_bytes: int  # size of the file
    digest: str  # result of `digest_shard`
    anchors: np.ndarray  # uint64, the offset of every 64th record


class DatasetIndex:
    """The head of an index, and access to its offsets. Can be pickled.

    A record at a multiple of 64 is located by the head alone. Other offsets are read from the file,
    64 at a time.

    Attributes:
        path: path or URL of the file.
        head: bytes of the head.
        vocabulary: vocabulary of the labels of all shards (`Vocabulary.describe`), if known.
        labels: for label shards, the result of `labels.shards.describe_labels`; else empty.
        names, kinds: str, of each shard.
        rows: name of a shard -> its row.
        num_records, num_bytes: int64 [shards].
        starts: int64 [shards + 1], the first record of each shard.
        file_bytes: size of the file.
    """

    def __init__(self, head: bytes, path: str, local_path: str | None = None):
        """Parses and checks a head; `local_path` is a copy of the file on this host.

        Raises:
            TFRecordError: the head is damaged, or its numbers contradict each other.
        """
        self.head, self.path = head, path
        self._local_path = local_path or (None if is_remote(path) else path)
        self._file: Any = None
        self._last: tuple[int, int, Any] = (0, 0, None)  # the last offsets that were read
        try:
            self._parse()
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise damaged_index(self.path, str(error)) from error

    def __len__(self) -> int:
        return len(self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.head, self.path, self._local_path)

    def sizes(self, kind: str | None = None) -> dict[str, int]:
        """Returns name -> bytes of all shards, or of those of one kind."""
        rows = zip(self.names, self.kinds, self.num_bytes.tolist(), strict=True)
        return {name: size for name, its_kind, size in rows if kind in (None, its_kind)}

    def entry(self, row: int) -> ShardEntry:
        """Returns everything that the head states about a shard."""
        return ShardEntry(
            name=self.names[row],
            kind=self.kinds[row],
            num_records=int(self.num_records[row]),
            num_bytes=int(self.num_bytes[row]),
            digest=f"{int(self._digests[row]):016x}",
            anchors=self._anchors[self._anchor_starts[row] : self._anchor_starts[row + 1]],
        )

    def extent(self, row: int, begin: int, end: int) -> tuple[int, int]:
        """Returns first byte and end of the records [begin, end); errors as `damaged_index`."""
        smallest, size = KINDS[self.kinds[row]], int(self.num_bytes[row])
        start = self._offset(row, begin)
        stop = size if end == self.num_records[row] else self._offset(row, end)
        if not start + smallest * (end - begin) <= stop <= size:
            raise damaged_index(
                self.path, f"record {begin} of {self.names[row]} would be at byte {start}"
            )
        return start, stop

    def bounds(self, row: int, begin: int, end: int) -> np.ndarray:
        """Returns int64 [end - begin + 1]: the offsets of the records [begin, end), then their end.

        Errors as `damaged_index`.
        """
        first = int(self.starts[row])
        is_last = end == self.num_records[row]
        offsets = self._read(first + begin, first + end + (not is_last))
        if is_last:
            offsets = np.append(offsets, self.num_bytes[row].astype(np.uint64))
        if (offsets > np.uint64(self.num_bytes[row])).any():
            raise damaged_index(
                self.path, f"records {begin} to {end - 1} of {self.names[row]} are elsewhere"
            )
        return offsets.astype(np.int64)

    def offsets(self, row: int) -> np.ndarray:
        """Returns uint64 [n], where the records of a shard begin."""
        return self._read(int(self.starts[row]), int(self.starts[row + 1]))

    def make_local(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        """Downloads an index from a store; the processes of a host share one copy.

        `cache_dir` is the cache folder. None uses a per-user folder in the system's temporary one.

        Raises:
            ValueError: the disk has too little free space.
        """
        if self._local_path is None:
            self._local_path = cached_copy(
                self.path,
                f"dataset-{hashlib.sha256(self.head).hexdigest()[:32]}.index",
                self.file_bytes,
                cache_dir,
                "name another folder by config.data.cache_dir, or take "
                'config.data.order="blocks", which does not need it',
            )
            self._file = None

    def _offset(self, row: int, record: int) -> int:
        """Returns the first byte of a record that is not the end of its shard."""
        group, within = divmod(record, ANCHOR_RECORDS)
        if not within:
            return int(self._anchors[self._anchor_starts[row] + group])
        begin = int(self.starts[row]) + group * ANCHOR_RECORDS
        end = min(begin + ANCHOR_RECORDS, int(self.starts[row + 1]))
        return int(self._read(begin, end)[within])

    def _read(self, begin: int, end: int) -> np.ndarray:
        """Reads the offsets [begin, end), numbered across all shards."""
        last = self._last  # read once, since other threads may replace it
        if last[:2] == (begin, end) and last[2] is not None:
            return last[2]
        if self._file is None:
            file = RangesFile(self._local_path or self.path, self.file_bytes)
            if self._local_path is not None:
                found = file.read_range(0, _PREAMBLE.size), file.size
                if found != (encode_preamble(self.head), self.file_bytes):
                    raise ValueError(f"{self._local_path} was written again since; start again")
            self._file = file
        start = _PREAMBLE.size + len(self.head)
        data = self._file.read_range(start + 8 * begin, start + 8 * end)
        if len(data) != 8 * (end - begin):
            raise damaged_index(self.path, "it is cut off")
        offsets = np.frombuffer(data, "<u8")
        self._last = begin, end, offsets
        return offsets

    def _parse(self) -> None:
        head = self.head
        (json_bytes,) = _LENGTH.unpack_from(head)
        if json_bytes > len(head):
            raise ValueError("its JSON is cut off")
        position = _LENGTH.size
        facts = json.loads(head[position : position + json_bytes])
        numbers = [facts[name] for name in ("shards", "records", "anchors", "names_bytes")]
        for number in numbers:
            if type(number) is not int or not 0 <= number < _MAX_NUMBER:
                raise ValueError("a number of its JSON is out of range")
        shards, num_records, anchors, names_bytes = numbers
        position += json_bytes + -json_bytes % 8
        arrays_bytes = 8 * (3 * shards + anchors) + shards + names_bytes
        if position + arrays_bytes + -arrays_bytes % 8 != len(head):
            raise ValueError("its arrays have another size than its JSON states")
        columns = np.frombuffer(head, "<u8", 3 * shards + anchors, position)
        position += columns.nbytes
        records, sizes, self._digests, self._anchors = np.split(
            columns, [shards, 2 * shards, 3 * shards]
        )
        if max(records.max(initial=0), sizes.max(initial=0)) > _MAX_NUMBER:
            raise ValueError("a number of its table is out of range")
        kinds = np.frombuffer(head, np.uint8, shards, position)
        names = os.fsdecode(head[position + shards : position + shards + names_bytes])
        self.num_records, self.num_bytes = records.astype(np.int64), sizes.astype(np.int64)
        self.kinds = [facts["kinds"][kind] for kind in kinds.tolist()]
        self.names = names.split("\0")[:-1]
        self.rows = dict(zip(self.names, range(len(self.names)), strict=True))
        if len(self.names) != shards or len(self.rows) != shards or names[-1:] not in ("", "\0"):
            raise ValueError(f"it has {len(self.rows)} names for {shards} shards")
        for name in self.names:
            if name in ("", ".", "..") or "/" in name:
                raise ValueError(f"'{name!r:.80}' is no name of a file in its folder")
        smallest = np.array([KINDS[kind] for kind in self.kinds], np.int64)
        if (self.num_records > self.num_bytes // np.maximum(smallest, 1)).any():
            raise ValueError("a shard has more records than there is room for")
        self.starts = np.concatenate([[0], np.cumsum(self.num_records)]).astype(np.int64)
        groups = -(-self.num_records // ANCHOR_RECORDS)
        self._anchor_starts = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)
        if (self.starts[-1], self._anchor_starts[-1]) != (num_records, anchors):
            raise ValueError("its numbers of records differ")
        self.file_bytes = _PREAMBLE.size + len(head) + 8 * num_records
        self.vocabulary: dict[str, Any] | None = facts.get("vocabulary")
        self.labels: dict[str, Any] = facts.get("labels") or {}


def damaged_index(path: str, detail: str) -> TFRecordError:
    """Returns the error for an index that cannot be used."""
    return TFRecordError(
        f"{path}: this index is damaged ({detail}); delete it, or make it again by "
        f"`{rebuild_command(path)} --overwrite`"
    )


def rebuild_command(path: str) -> str:
    """Returns the command that updates an index, given the path of the index or of a shard."""
    return f"python -m diht_jax.data.index {os.path.dirname(path) or '.'}"


def read_index(folder: str, file_bytes: int | None = None) -> DatasetIndex | None:
    """Reads the head of a folder's index with one or two requests; None if there is no index.

    Raises:
        TFRecordError: the index is damaged or cut off.
    """
    path = os.path.join(folder, INDEX_NAME)
    try:
        with RangesFile(path, file_bytes or 0) as file:
            file_bytes = file_bytes if is_remote(path) else file.size
            data = file.read_range(0, _FIRST_READ_BYTES)
            if len(data) < _PREAMBLE.size or not data.startswith(_MAGIC):
                raise damaged_index(path, "it has no valid header")
            _, head_bytes, checksum, _ = _PREAMBLE.unpack_from(data)
            if head_bytes > (_MAX_HEAD_BYTES if file_bytes is None else file_bytes):
                raise damaged_index(path, "it is cut off")
            end = _PREAMBLE.size + head_bytes
            if end > len(data) == _FIRST_READ_BYTES:
                data += file.read_range(len(data), end)
    except (FileNotFoundError, NotADirectoryError):
        return None
    head = data[_PREAMBLE.size : end]
    if len(head) != head_bytes:
        raise damaged_index(path, "it is cut off")
    if google_crc32c.value(head) != checksum:
        raise damaged_index(path, "the checksum of its table differs")
    index = DatasetIndex(head, path)
    if file_bytes is not None and file_bytes != index.file_bytes:
        raise damaged_index(path, f"it has {file_bytes} bytes, and {index.file_bytes} are expected")
    return index


def encode_head(
    entries: Sequence[ShardEntry],
    vocabulary: Mapping[str, Any] | None = None,
    labels: Mapping[str, Any] | None = None,
) -> bytes:
    """Returns the head of an index with the entries of all shards, in order.

    `vocabulary` is the shards' vocabulary as `Vocabulary.describe` returns it. `labels` is the
    result of `labels.shards.describe_labels`, for label shards only.
    """
    kinds = sorted({entry.kind for entry in entries})
    names = b"".join(os.fsencode(entry.name) + b"\0" for entry in entries)
    anchors = [entry.anchors.astype("<u8").tobytes() for entry in entries]
    facts: dict[str, Any] = {
        "shards": len(entries),
        "records": sum(entry.num_records for entry in entries),
        "anchors": sum(map(len, anchors)) // 8,
        "names_bytes": len(names),
        "kinds": kinds,
    }
    if vocabulary is not None:
        facts["vocabulary"] = dict(vocabulary)
    if labels:
        facts["labels"] = dict(labels)
    text = json.dumps(facts, sort_keys=True).encode()
    columns = [
        [entry.num_records for entry in entries],
        [entry.num_bytes for entry in entries],
        [int(entry.digest, 16) for entry in entries],
    ]
    arrays = np.array(columns, "<u8").tobytes() + b"".join(anchors)
    arrays += bytes(kinds.index(entry.kind) for entry in entries) + names
    return _LENGTH.pack(len(text)) + _padded(text) + _padded(arrays)


def encode_preamble(head: bytes) -> bytes:
    """Returns the first bytes of an index with a given head."""
    return _PREAMBLE.pack(_MAGIC, len(head), google_crc32c.value(head), 0)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)
