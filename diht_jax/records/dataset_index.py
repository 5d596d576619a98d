"""One index of a whole data set: the file `dataset.index` in the folder of its shards.

It states of every shard its name, records, bytes and digest, and of every record where it begins.
All numbers are little-endian::

    preamble   8 bytes "DIHTSET1" | uint64 bytes of the head | uint32 CRC32C of the head | uint32 0
    head       uint64 bytes of the JSON | JSON | zeros up to a multiple of 8
               uint64 records [shards] | uint64 bytes [shards] | uint64 digest [shards]
               uint64 anchors [anchors] | uint8 kind [shards] | names, each ended by a zero byte
               zeros up to a multiple of 8
    offsets    uint64 [records]

The JSON has `shards`, `records`, `anchors` and `names_bytes` (how long the arrays are), `kinds`
(what a kind's number means), maybe `vocabulary` (of the concepts that all shards are labelled
with) and, of shards of labels, `labels` (which record shards they belong to, see
`labels/shards.py`). Anchors are the offsets of the records 0, 64, 128, ... of every shard: with the
head alone, which is small, one finds the blocks of every multiple of 64 records. The offsets are
memory-mapped, or read a few at a time. A record ends where the next one begins, the last one with
its shard. A shard's digest is the number that its 16 hex digits write; see `digest_shard`.

The head is checked when it is read. The offsets, which may take gigabytes, are checked one by one
as they are used: no offset leads out of its shard, and a record's own frame must fit both of its
offsets.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np

from diht_jax.records.format import TFRecordError
from diht_jax.storage.stores import is_remote, open_file, read_range

INDEX_NAME = "dataset.index"
ANCHOR_RECORDS = 64
END_BYTES = 4096  # of both ends of a shard, in its digest

# Fewest bytes of a record, by the kind of a shard: an empty frame, the header of a tar's member.
KINDS = {"tfrecord": 16, "tar": 512}

_MAGIC = b"DIHTSET1"
_PREAMBLE = struct.Struct("<8sQII")
_LENGTH = struct.Struct("<Q")
_MAX_SHARD_BYTES = 2**62  # so that sums of offsets and lengths fit into an int64
# Read at first: enough for the preamble and the head of some thousands of shards.
_FIRST_READ_BYTES = 2**20
_MAX_HEAD_BYTES = 2**36


def digest_shard(offsets: np.ndarray, head: bytes, tail: bytes) -> str:
    """Digest of the places of a shard's records and of its ends, 16 hex digits.

    Args:
        offsets: uint64 [n], where the records begin.
        head: the first `END_BYTES` of the shard.
        tail: the last `END_BYTES`.
    """
    digest = hashlib.sha256(offsets.astype("<u8").tobytes())
    digest.update(head)
    digest.update(tail)
    return digest.hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class ShardEntry:
    """The entry of one shard in the index, without its offsets.

    Attributes:
        name: within the folder.
        kind: one of `KINDS`.
        num_records: how many.
        num_bytes: size of the file.
        digest: of `digest_shard`.
        anchors: uint64, the offset of every 64th record.
    """

    name: str
    kind: str
    num_records: int
    num_bytes: int
    digest: str
    anchors: np.ndarray

    @classmethod
    def of_shard(
        cls, name: str, kind: str, num_bytes: int, offsets: np.ndarray, digest: str
    ) -> ShardEntry:
        """The entry of a shard whose offsets are known."""
        anchors = np.array(offsets[::ANCHOR_RECORDS], np.uint64)
        return cls(name, kind, len(offsets), num_bytes, digest, anchors)


class ShardTable:
    """The head of an index.

    Attributes:
        head: its bytes.
        names, kinds: str, of each shard.
        num_records, num_bytes: int64 [shards].
        starts: int64 [shards + 1], the first record of each shard.
        facts: the JSON.
    """

    def __init__(self, head: bytes, path: str):
        """Reads and checks a head.

        Args:
            head: of the file.
            path: of the file, for messages.

        Raises:
            TFRecordError: it is damaged, or its numbers contradict each other.
        """
        try:
            self._parse(head)
            self._check()
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            raise damaged(path, str(error)) from error
        self.head = head
        self.path = path

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def rows(self) -> dict[str, int]:
        """The row of each shard, by its name."""
        return {name: row for row, name in enumerate(self.names)}

    @functools.cached_property
    def identity(self) -> str:
        """32 hex digits that two indices share only where they describe the same shards."""
        return hashlib.sha256(self.head).hexdigest()[:32]

    @property
    def vocabulary(self) -> dict[str, Any] | None:
        """The labels of all shards (`Vocabulary.describe`), where they are known."""
        return self.facts.get("vocabulary")

    @property
    def labels(self) -> dict[str, Any] | None:
        """What `labels.shards.describe_labels` states; None of any other data set."""
        return self.facts.get("labels")

    @property
    def offsets_start(self) -> int:
        """First byte of the offsets in the file."""
        return _PREAMBLE.size + len(self.head)

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.offsets_start + 8 * int(self.starts[-1])

    def digest(self, row: int) -> str:
        """The digest of a shard, 16 hex digits."""
        return f"{int(self._digests[row]):016x}"

    def anchor(self, row: int, group: int) -> int:
        """The offset of record 64 * group of a shard."""
        return int(self._anchors[self._anchor_starts[row] + group])

    def entry(self, row: int) -> ShardEntry:
        """All that is stated of a shard."""
        anchors = self._anchors[self._anchor_starts[row] : self._anchor_starts[row + 1]]
        return ShardEntry(
            name=self.names[row],
            kind=self.kinds[row],
            num_records=int(self.num_records[row]),
            num_bytes=int(self.num_bytes[row]),
            digest=self.digest(row),
            anchors=anchors,
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"head": self.head, "path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _parse(self, head: bytes) -> None:
        (json_bytes,) = _LENGTH.unpack_from(head)
        if json_bytes > len(head):
            raise ValueError("its JSON is cut off")
        position = _LENGTH.size
        facts = json.loads(head[position : position + json_bytes])
        numbers = [facts[name] for name in ("shards", "records", "anchors", "names_bytes")]
        if not all(type(number) is int and 0 <= number < 2**61 for number in numbers):
            raise ValueError("a number of its JSON is out of range")
        shards, self._stated_records, anchors, names_bytes = numbers
        position += json_bytes + -json_bytes % 8
        arrays_bytes = 8 * (3 * shards + anchors) + shards + names_bytes
        if position + arrays_bytes + -arrays_bytes % 8 != len(head):
            raise ValueError("its arrays have another size than its JSON states")
        columns = np.frombuffer(head, "<u8", 3 * shards + anchors, position)
        position += columns.nbytes
        records, sizes, self._digests, self._anchors = np.split(
            columns, [shards, 2 * shards, 3 * shards]
        )
        if max(records.max(initial=0), sizes.max(initial=0)) > _MAX_SHARD_BYTES:
            raise ValueError("a number of its table is out of range")
        kinds = np.frombuffer(head, np.uint8, shards, position)
        names = head[position + shards : position + shards + names_bytes].decode()
        self.facts = facts
        self.num_records, self.num_bytes = records.astype(np.int64), sizes.astype(np.int64)
        self.kinds = [facts["kinds"][kind] for kind in kinds.tolist()]
        self.names = names.split("\0")[:-1]
        if len(self.names) != shards or not (names.endswith("\0") or not names):
            raise ValueError(f"it has {len(self.names)} names for {shards} shards")

    def _check(self) -> None:
        for name in self.names:
            if name in ("", ".", "..") or "/" in name:
                raise ValueError(f"'{name!r:.80}' is no name of a file in its folder")
        if len(self.rows) != len(self.names):
            raise ValueError("two shards have one name")
        smallest = np.array([KINDS[kind] for kind in self.kinds], np.int64)
        counts = self.num_records
        if (counts > self.num_bytes // np.maximum(smallest, 1)).any():
            raise ValueError("a shard has more records than there is room for")
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if self.starts[-1] != self._stated_records or (self.starts < 0).any():
            raise ValueError("its numbers of records differ")
        groups = -(-counts // ANCHOR_RECORDS)
        self._anchor_starts = np.concatenate([[0], np.cumsum(groups)]).astype(np.int64)
        if self._anchor_starts[-1] != len(self._anchors):
            raise ValueError("its number of anchors is wrong")
        # Every group must have room for its records before the next one, or before the end.
        shard = np.repeat(np.arange(len(counts)), groups)
        group = np.arange(len(shard)) - self._anchor_starts[:-1][shard]
        room = smallest[shard] * np.minimum(ANCHOR_RECORDS, counts[shard] - ANCHOR_RECORDS * group)
        ends = self.num_bytes[shard]
        is_last = ANCHOR_RECORDS * (group + 1) >= counts[shard]
        if (self._anchors > np.uint64(_MAX_SHARD_BYTES)).any():
            raise ValueError("an anchor is out of range")
        anchors = self._anchors.astype(np.int64)
        ends = np.where(is_last, ends, np.append(anchors[1:], 0))
        if (anchors + room > ends).any():
            raise ValueError("an anchor leads out of its shard")


def damaged(path: str, detail: str) -> TFRecordError:
    """The error for an index that cannot be used."""
    return TFRecordError(
        f"{path}: this index is damaged ({detail}); delete it, or make it again by "
        f"`{rebuild_command(os.path.dirname(path))} --overwrite`"
    )


def rebuild_command(folder: str) -> str:
    """The command that brings the index of a folder up to date."""
    return f"python -m diht_jax.data.index {folder or '.'}"


def read_table(path: str, file_bytes: int | None = None) -> ShardTable:
    """Reads the head of an index: in a store, by one or two requests.

    Args:
        path: of the index, or its URL.
        file_bytes: its size, where that is known.

    Raises:
        FileNotFoundError: there is none.
        TFRecordError: it is damaged, or cut off.
    """
    if is_remote(path):
        first = read_range(path, 0, _FIRST_READ_BYTES)
        head_bytes, checksum = _unpack_preamble(path, first, file_bytes)
        end = _PREAMBLE.size + head_bytes
        if end > len(first) == _FIRST_READ_BYTES:
            first += read_range(path, len(first), end)
        head = first[_PREAMBLE.size : end]
    else:
        with open_file(path) as file:
            file_bytes = file.seek(0, os.SEEK_END)
            file.seek(0)
            preamble = file.read(_PREAMBLE.size)
            head_bytes, checksum = _unpack_preamble(path, preamble, file_bytes)
            head = file.read(head_bytes)
    if len(head) != head_bytes:
        raise damaged(path, "it is cut off")
    if google_crc32c.value(head) != checksum:
        raise damaged(path, "the checksum of its table differs")
    table = ShardTable(head, path)
    if file_bytes is not None and file_bytes != table.file_bytes:
        raise damaged(path, f"it has {file_bytes} bytes, and {table.file_bytes} are expected")
    return table


def check_same(path: str, table: ShardTable) -> None:
    """Raises ValueError where a local index is not the one whose head is known.

    Args:
        path: of the index; 24 bytes of it are read.
        table: as another process, or this one, has read it before.
    """
    try:
        with open(path, "rb") as file:
            found, size = file.read(_PREAMBLE.size), os.fstat(file.fileno()).st_size
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing on this host, and the first process has it; give every host the "
            "same files"
        ) from error
    if (found, size) != (encode_preamble(table.head), table.file_bytes):
        raise ValueError(
            f"{path} is another index than the first process has read, or was written again since; "
            "give every host the same files, and start again"
        )


def encode_head(
    entries: Sequence[ShardEntry],
    vocabulary: Mapping[str, Any] | None = None,
    labels: Mapping[str, Any] | None = None,
) -> bytes:
    """The head of an index.

    Args:
        entries: of all shards, in their order.
        vocabulary: what they are labelled with, as `Vocabulary.describe` gives it.
        labels: what `labels.shards.describe_labels` states of shards of labels.
    """
    kinds = sorted({entry.kind for entry in entries})
    names = b"".join(entry.name.encode() + b"\0" for entry in entries)
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
    if labels is not None:
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


def _unpack_preamble(path: str, data: bytes, file_bytes: int | None) -> tuple[int, int]:
    """Bytes of the head, and its checksum."""
    if len(data) < _PREAMBLE.size or not data.startswith(_MAGIC):
        raise damaged(path, "it has no valid header")
    _, head_bytes, checksum, _ = _PREAMBLE.unpack_from(data)
    if head_bytes > (_MAX_HEAD_BYTES if file_bytes is None else file_bytes):
        raise damaged(path, "it is cut off")
    return head_bytes, checksum


def encode_preamble(head: bytes) -> bytes:
    """The first bytes of an index with a given head."""
    return _PREAMBLE.pack(_MAGIC, len(head), google_crc32c.value(head), 0)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)
