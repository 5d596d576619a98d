"""The offsets of records in a `dataset.index`: mapped from a disk, or read from a store."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from diht_jax.records.dataset_index import (
    ANCHOR_RECORDS,
    KINDS,
    ShardTable,
    check_same,
    damaged,
)
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.stores import is_remote, read_range

_CACHED_GROUPS = 1024  # of 64 offsets


class IndexedOffsets:
    """Finds where the records of the shards of a `dataset.index` begin and end.

    A record at a multiple of 64 is found with the head alone. Others are looked up in the file: a
    local one is memory-mapped, of one in a store 64 offsets are read at a time. It can be pickled.
    """

    def __init__(self, table: ShardTable, location: str):
        """Reads nothing yet.

        Args:
            table: the head.
            location: path or URL of the index.
        """
        self.table = table
        self.location = location
        self._file = None if is_remote(location) else location
        self._reset()

    def extent(self, row: int, begin: int, end: int) -> tuple[int, int]:
        """First byte and end of the records [begin, end) of a shard.

        Raises:
            TFRecordError: the index is damaged.
        """
        table = self.table
        smallest, size = KINDS[table.kinds[row]], int(table.num_bytes[row])
        start = self._offset(row, begin)
        stop = size if end == table.num_records[row] else self._offset(row, end)
        if not start + smallest * (end - begin) <= stop <= size:
            name = table.names[row]
            raise damaged(self.location, f"record {begin} of {name} would be at byte {start}")
        return start, stop

    def offsets(self, row: int) -> np.ndarray:
        """uint64 [n], where the records of a shard begin; of a local index."""
        return np.array(self._map()[self.table.starts[row] : self.table.starts[row + 1]])

    def make_local(self, cache_dir: str | os.PathLike[str] | None = None) -> None:
        """Downloads an index from a store; the processes of a host share one copy.

        Args:
            cache_dir: gets the file; None is a folder of this user in the system's temporary one.

        Raises:
            ValueError: there is no room for it.
        """
        if self._file is None:
            self._file = cached_copy(
                self.location,
                f"dataset-{self.table.identity}.index",
                self.table.file_bytes,
                cache_dir,
                "name another folder by config.data.cache_dir, or take "
                'config.data.order="blocks", which does not need it',
            )
            self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("table", "location", "_file")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def _reset(self) -> None:
        self._mapped: np.ndarray | None = None
        self._read_group = functools.lru_cache(maxsize=_CACHED_GROUPS)(
            functools.partial(_read_offsets, self.location, self.table.offsets_start)
        )

    def _offset(self, row: int, record: int) -> int:
        """The first byte of a record that is not the end of its shard."""
        group, within = divmod(record, ANCHOR_RECORDS)
        if not within:
            return self.table.anchor(row, group)
        begin = int(self.table.starts[row]) + group * ANCHOR_RECORDS
        if self._file is not None:
            return int(self._map()[begin + within])
        end = min(begin + ANCHOR_RECORDS, int(self.table.starts[row + 1]))
        return int(self._read_group(begin, end)[within])

    def _map(self) -> np.ndarray:
        if self._mapped is None:
            check_same(self._file, self.table)
            start, count = self.table.offsets_start, int(self.table.starts[-1])
            # Threads read records at once: none may see anything but the whole map. Nothing cannot
            # be mapped.
            self._mapped = (
                np.memmap(self._file, "<u8", "r", start, (count,))
                if count
                else np.zeros(0, np.uint64)
            )
        return self._mapped


def _read_offsets(location: str, offsets_start: int, begin: int, end: int) -> np.ndarray:
    """Some offsets of an index in a store, numbered through all shards."""
    data = read_range(location, offsets_start + 8 * begin, offsets_start + 8 * end)
    if len(data) != 8 * (end - begin):
        raise damaged(location, "it is cut off")
    return np.frombuffer(data, "<u8")
