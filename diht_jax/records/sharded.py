"""Access to records numbered across many shards: the code that all shard formats share.

A block is a run of consecutive records of one shard, which one ranged request can read.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import operator
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diht_jax.records import schema
from diht_jax.records.catalog import Paths, Shard, open_catalog
from diht_jax.records.dataset_index import END_BYTES, digest_shard, rebuild_command
from diht_jax.records.shard_files import (
    DamagedRecordError,
    ShardIndex,
    TFRecordError,
    wrong_index,
)
from diht_jax.storage.files import map_many
from diht_jax.storage.stores import RangesFile, input_size, is_remote

# A local shard takes two descriptors; this stays well below the usual limit of 1024.
_MAX_OPEN_SHARDS = 128


class ShardedRecords(Sequence[bytes]):
    """A sequence of the records of several shards, in the order of the shards.

    Can be pickled, shared by threads (every read has its own offset) and inherited by forks. The
    number of open files is bounded for any number of shards. A shard that a `dataset.index`
    describes is not opened before it is read. The first read of a local one compares its ends with
    the digest in the index.

    Attributes:
        paths: paths of the shards.
        unindexed_urls: shards in a store that no `dataset.index` describes; opening each one costs
            requests.
    """

    kind: str  # a key of `shard_files.SUFFIXES`
    shard_type: type[OpenShard]

    def __init__(self, paths: Paths, shards: Sequence[Shard] | None = None):
        """Finds the shards, and counts the records of those that no `dataset.index` describes.

        Args:
            paths: a shard, a folder of shards, a glob, or a list of these, also as URLs in an
                object store.
            shards: those that `catalog.open_catalog` has found at the paths, if known.

        Raises:
            ValueError: no shard is found, or (`TFRecordError`) a shard or an index is broken.
        """
        self._shards = open_catalog(paths, self.kind)[1] if shards is None else shards
        self.paths: list[str] = []
        self._offsets_in_memory: dict[int, np.ndarray] = {}
        self._unchecked: set[int] = set()
        self.unindexed_urls: list[str] = []
        counts, identity = [0], []
        counted = map_many(self.shard_type.count, self._shards)
        for number, (count, size, offsets) in enumerate(counted):
            shard = self._shards[number]
            self.paths.append(shard.path)
            counts.append(count)
            identity.append(f"{os.path.basename(shard.path)} {count} {size}")
            if offsets is not None:
                self._offsets_in_memory[number] = offsets
            if shard.index is None and is_remote(shard.path):
                self.unindexed_urls.append(shard.path)
            elif shard.index is not None and not is_remote(shard.path):
                self._unchecked.add(number)
        self._starts = np.cumsum(counts, dtype=np.int64)
        self._digest = hashlib.sha256(os.fsencode("\n".join(identity))).hexdigest()[:16]
        self._reset_open_shards()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shard_lengths(self) -> np.ndarray:
        """int64 [shards], the number of records of each shard."""
        return np.diff(self._starts)

    def block_starts(self, block_records: int) -> np.ndarray:
        """Divides shards into blocks of consecutive records; no block crosses a shard boundary.

        Blocks begin at multiples of `block_records` in their shard. A remainder of less than half a
        block joins the previous block.

        Args:
            block_records: K, the usual length of a block.

        Returns:
            int64 [B + 1]: the first record of each block, then the number of records.
        """
        lengths = np.asarray(self.shard_lengths, np.int64)
        whole, left = np.divmod(lengths, block_records)
        counts = whole + ((left > 0) & ((2 * left >= block_records) | (whole == 0)))
        within_shard = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(np.cumsum(lengths) - lengths, counts) + within_shard * block_records
        return np.append(starts, lengths.sum())

    def locate(self, index: int) -> tuple[str, int]:
        """Returns the shard path of a record and its number in the shard, for messages."""
        number, record = self._find(index)
        return self.paths[number], record

    def make_offsets_local(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        """Downloads the indices that allow single records of a store to be read with one request.

        Does nothing for local shards and for shards without a `dataset.index`. `cache_dir` is the
        cache folder; None uses a per-user folder in the system's temporary one.
        """
        for shard in self._shards:
            if shard.index is not None:
                shard.index.make_local(cache_dir)

    def identify(self, number: int) -> tuple[int, int, str]:
        """Returns records, bytes and digest of a shard; see `train_data.fingerprint_records`."""
        shard = self._shards[number]
        if shard.index is not None:
            entry = shard.index.entry(shard.row)
            return entry.num_records, entry.num_bytes, entry.digest
        # Bypasses the cache, since a pass over all shards would evict those being read.
        return self.shard_type(shard, self._offsets_in_memory.get(number)).identify()

    def __getitem__(self, index: int) -> bytes:
        """Returns the bytes of one element.

        Raises:
            IndexError: the index is negative or too large.
            TFRecordError: the record is damaged, or the shard or its index was replaced.
            StorageError: the record cannot be read, even after retries.
        """
        number, record = self._find(index)
        return self._opened(number).read(record)

    def extent(self, first: int, last: int) -> tuple[str, int, int]:
        """Returns the byte range of the records [first, last) of one shard, for one ranged request.

        Returns:
            Path of the shard, first byte, end.

        Raises:
            IndexError: a record does not exist, or the records are in several shards.
            TFRecordError: a local shard does not match its `dataset.index`.
        """
        number, begin, end = self._find_range(first, last)
        return self.paths[number], *self._opened(number).extent(begin, end)

    def cut(self, first: int, last: int, data: bytes) -> np.ndarray:
        """Splits the bytes of the extent of [first, last) at its records.

        Returns:
            int64 [last - first + 1], the start of each record's piece, then the end of the last.

        Raises:
            TFRecordError: these are not the bytes of the extent.
        """
        number, begin, end = self._find_range(first, last)
        starts = self._open_shard(number).bounds(begin, end)
        if starts[-1] - starts[0] != len(data):
            raise TFRecordError(
                f"{self.paths[number]}: records {begin} to {end - 1}: {len(data)} bytes were read, "
                f"and {starts[-1] - starts[0]} expected; the shard was replaced or cut off"
            )
        return starts - starts[0]

    def unpack(self, index: int, piece: bytes) -> bytes:
        """Returns the element of a record from its piece between two entries of `cut`.

        Raises:
            TFRecordError: the record is damaged.
        """
        del index
        return piece

    def split(self, first: int, last: int, data: bytes) -> Iterator[bytes]:
        """Yields the elements in the bytes of an extent; arguments and errors as in `cut`.

        Raises:
            TFRecordError: a record is damaged.
        """
        starts = self.cut(first, last, data)
        for index, (start, end) in enumerate(itertools.pairwise(starts), first):
            yield self.unpack(index, data[start:end])

    # Decodes an element into a record.
    decode = staticmethod(schema.decode_record)

    def __repr__(self) -> str:
        # Grain compares this when it restores an iterator, so it must be the same for the same
        # data in any folder.
        return (
            f"{type(self).__name__}(shards={len(self.paths)}, records={len(self)}, "
            f"digest={self._digest})"
        )

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_open_shard"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._reset_open_shards()

    def _find(self, index: int) -> tuple[int, int]:
        """Returns the number of a record's shard, and of the record in the shard."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {self!r}")
        number = int(self._starts.searchsorted(index, side="right")) - 1
        return number, index - int(self._starts[number])

    def _find_range(self, first: int, last: int) -> tuple[int, int, int]:
        """Returns the shard of the records [first, last), and their range in the shard."""
        number, begin = self._find(first)
        end = begin + last - first
        if not begin < end <= self._starts[number + 1] - self._starts[number]:
            raise IndexError(f"records {first} to {last - 1} of {self!r} are not in one shard")
        return number, begin, end

    def _opened(self, number: int) -> OpenShard:
        """Returns an open shard after comparing its ends with its `dataset.index`."""
        shard = self._open_shard(number)
        if number in self._unchecked:
            shard.check_ends()
            self._unchecked.discard(number)
        return shard

    def _reset_open_shards(self) -> None:
        # The cache locks in C, under the interpreter's lock, so a fork cannot inherit a locked
        # Python lock. An evicted shard is closed when its last reader is done. The cache must not
        # refer to this object, since a reference cycle would keep files open.
        self._open_shard = functools.lru_cache(maxsize=_MAX_OPEN_SHARDS)(
            functools.partial(_open, self.shard_type, self._shards, self._offsets_in_memory)
        )


def _open(
    shard_type: type[OpenShard], shards: Sequence[Shard], in_memory: dict[int, Any], number: int
) -> OpenShard:
    return shard_type(shards[number], in_memory.get(number))


class OpenShard:
    """One open shard; closed by the garbage collector.

    Attributes:
        index: index of the format, for a shard that no `dataset.index` describes.
        path: path of the shard.
        size: size in bytes.
        num_records: number of records.
    """

    index: ShardIndex

    def __init__(self, shard: Shard, offsets: np.ndarray | None = None):
        """Opens the file; `offsets`, uint64 [n], are the starts of its records, if known.

        Raises:
            TFRecordError: its size differs from its index, or the index is damaged.
        """
        self.path = shard.path
        self._described, self._row = shard.index, shard.row
        opened = RangesFile(shard.path, shard.num_bytes)
        self.size, self.read_range = opened.size, opened.read_range
        if self._described is not None:
            self.num_records = int(self._described.num_records[shard.row])
            if self.size != shard.num_bytes:
                detail = f"it was made for {shard.num_bytes} bytes, the shard has {self.size}"
                raise self.wrong(detail)
            return
        self._offsets = self.index.find(self.path, self.size) if offsets is None else offsets
        self.num_records = len(self._offsets)

    @classmethod
    def count(cls, shard: Shard) -> tuple[int, int, np.ndarray | None]:
        """Returns record count, bytes, and the offsets if they could not be saved to a file."""
        size = input_size(shard.path) if shard.num_bytes is None else shard.num_bytes
        if shard.index is not None:
            return shard.index.num_records.item(shard.row), size, None
        offsets = cls.index.load(shard.path, size)
        if offsets is None:
            offsets = cls.index.scan(shard.path)
            try:
                cls.index.write(shard.path, offsets, size)
            except Exception:  # each store's client has its own error for a refusal
                return len(offsets), size, offsets
        return len(offsets), size, None

    def identify(self) -> tuple[int, int, str]:
        """Returns records, bytes and digest of a shard that no `dataset.index` describes."""
        return self.num_records, self.size, digest_shard(self._offsets, *read_ends(self))

    def check_ends(self) -> None:
        """Raises TFRecordError unless the digest of its ends matches its `dataset.index`."""
        assert self._described is not None
        offsets = self._described.offsets(self._row)
        is_same = digest_shard(offsets, *read_ends(self)) == self._described.entry(self._row).digest
        if not is_same and not self._has_damaged_end(offsets):
            raise self.wrong("its first or last 4 KiB are not those that the index was made of")

    def _has_damaged_end(self, offsets: np.ndarray) -> bool:
        """Returns whether an end mismatch is a damaged record, which its read reports by itself."""
        ends = np.append(offsets[1:], np.uint64(self.size))
        at_ends = (offsets < END_BYTES) | (ends + np.uint64(END_BYTES) > self.size)
        try:
            for record in np.flatnonzero(at_ends).tolist():
                self.read(record)
        except DamagedRecordError:
            return True
        return False

    def read(self, record: int) -> bytes:
        """Reads the bytes of an element."""
        if record >= self.num_records:
            raise self.wrong(f"record {record}: the shard or its index was replaced")
        return self.read_range(*self.extent(record, record + 1))

    def extent(self, begin: int, end: int) -> tuple[int, int]:
        """Returns the first byte and the end of some records."""
        if self._described is not None:
            return self._described.extent(self._row, begin, end)
        stop = self.size if end == self.num_records else int(self._offsets[end])
        return int(self._offsets[begin]), stop

    def bounds(self, begin: int, end: int) -> np.ndarray:
        """Returns int64 [end - begin + 1], the starts of some records, then their end."""
        if self._described is not None:
            return self._described.bounds(self._row, begin, end)
        starts = self._offsets[begin : end + 1].astype(np.int64)
        return np.append(starts, self.size) if end == self.num_records else starts

    def wrong(self, detail: str) -> TFRecordError:
        """Returns the error for an index that does not describe the shard."""
        if self._described is None:
            return wrong_index(self.path, detail)
        return TFRecordError(
            f"{self._described.path} does not belong to {self.path} ({detail}); write or copy the "
            f"shard again, or, if it is right, make the index again by "
            f"`{rebuild_command(self._described.path)} --overwrite`"
        )


def read_ends(file: Any) -> tuple[bytes, bytes]:
    """Reads the first and the last bytes of an open shard, for `digest_shard`."""
    if not file.size:  # stores refuse any range of an empty file
        return b"", b""
    head = file.read_range(0, END_BYTES)
    return head, file.read_range(max(0, file.size - END_BYTES), file.size)
