"""The shards that a data set consists of, and where their records lie.

Where a folder has a `dataset.index`, one listing of the folder and the head of the index are all
that is looked at, whatever the number of shards. The listing shows whether the index still fits:
shards that are new, gone or of another size are an error. Several processes of a run can share what
the first one has read; those that have a copy of the folder on a disk look at 24 bytes of their own
index, so that other files are noticed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import glob
import itertools
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diht_jax.records.dataset_index import (
    ANCHOR_RECORDS,
    INDEX_NAME,
    KINDS,
    ShardTable,
    check_same,
    damaged,
    read_table,
    rebuild_command,
)
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.files import find_inputs, input_size, is_glob
from diht_jax.storage.stores import is_remote, read_range

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Calls a function in the first process of a run, and gives its result in all of them.
Share = Callable[[Callable[[], bytes]], bytes]

# Both `name-00000.tfrecord` and TFDS's default `name.tfrecord-00000-of-00010`.
_NAMES = {
    "tfrecord": re.compile(r"[^.].*\.tfrecord(-\d{5,}(-of-\d{5,})?)?"),
    "array_record": re.compile(r"[^.].*\.array_record(-\d{5,}(-of-\d{5,})?)?"),
    "tar": re.compile(r"[^.].*\.tar"),
}
_NOUNS = {"tfrecord": "TFRecord shard", "array_record": "ArrayRecord shard", "tar": "tar"}
_EXPECTED = {"tfrecord": "*.tfrecord", "array_record": "*.array_record", "tar": "*.tar"}
_LENGTH = struct.Struct("<Q")
_CACHED_GROUPS = 1024  # of 64 offsets
_NAMES_SHOWN = 3


class IndexedOffsets:
    """Where the records of the shards of a `dataset.index` begin and end.

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
        """Downloads an index that lies in a store; the processes of a host share one copy.

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


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard that was found.

    Attributes:
        path: its path or URL.
        num_bytes: its size, where a listing or an index stated it.
        index: the index that describes it, if any.
        row: its row there.
    """

    path: str
    num_bytes: int | None = None
    index: IndexedOffsets | None = None
    row: int = -1


def find_shards(paths: Paths, kind: str = "tfrecord") -> list[str]:
    """Resolves a shard, a folder, a glob or a list of them to shard paths.

    Args:
        paths: what to look for. A folder stands for its `*.tfrecord` and `*.tfrecord-*` files.
            URLs such as `gs://bucket/folder` are looked for in their object store.
        kind: of the shards, one of `dataset_index.KINDS`.

    Returns:
        Paths, sorted within each folder or glob, in the order of the list.

    Raises:
        ValueError: an entry matches no shard.
    """
    entries = _entries(paths, kind)
    lister = _Lister(kind, entries)
    return [path for entry in entries for path in lister.list(entry)[0]]


def open_catalog(paths: Paths, kind: str = "tfrecord", share: Share | None = None) -> list[Shard]:
    """Finds shards, and the indices that describe them.

    Args:
        paths: as of `find_shards`.
        kind: as of `find_shards`.
        share: for a run of several processes, all of which must call. What has an index is then
            listed and read by the first process alone.

    Raises:
        ValueError: an entry matches no shard, or an index is damaged or does not fit its folder.
    """
    entries = _entries(paths, kind)
    lister = _Lister(kind, entries)
    if share is None:
        return [shard for entry in entries for shard in lister.describe(entry)]
    found: list[list[Shard]] = []

    def read() -> bytes:
        found[:] = [lister.describe(entry) for entry in entries]
        return _pack(entries, found)

    packed = share(read)
    return [shard for shards in found or _unpack(packed, entries, lister) for shard in shards]


def is_shard(path: str, kind: str = "tfrecord") -> bool:
    """Whether a path is a file with the name of a shard; a URL is taken at its name."""
    return has_shard_name(path, kind) and (is_remote(path) or os.path.isfile(path))


def has_shard_name(path: str, kind: str = "tfrecord") -> bool:
    """Whether a path ends like that of a shard."""
    return _NAMES[kind].fullmatch(os.path.basename(path)) is not None


def list_folder(folder: str) -> dict[str, int]:
    """Bytes of the files of a folder, local or in a store, by name; one listing.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if is_remote(folder):
        found = find_inputs(folder)
        return {os.path.basename(path): size for path, size in found.items() if size is not None}
    with os.scandir(folder) as listed:
        return {entry.name: entry.stat().st_size for entry in listed if entry.is_file()}


def describe_stale(known: Mapping[str, int], found: Mapping[str, int], is_whole: bool) -> list[str]:
    """How shards differ from what an index states of them, in words; empty where it fits.

    Args:
        known: bytes by name, in the index.
        found: bytes by name.
        is_whole: whether these are all shards of the folder.
    """
    differing = {
        "changed": [name for name in found if name in known and found[name] != known[name]],
        "added": [name for name in found if name not in known],
        "removed": [name for name in known if name not in found] if is_whole else [],
    }
    return [
        f"{len(names):,} {what} ({', '.join(sorted(names)[:_NAMES_SHOWN])}"
        + (", ...)" if len(names) > _NAMES_SHOWN else ")")
        for what, names in differing.items()
        if names
    ]


class _Lister:
    """Looks for shards of one kind; lists each folder once, and reads each index once."""

    def __init__(self, kind: str, entries: Sequence[str]):
        self._kind = kind
        self._indices: dict[str, IndexedOffsets | None] = {}
        self._folders: dict[str, dict[str, int | None]] = {}
        self._entries_of = collections.Counter(map(os.path.dirname, entries))

    def list(self, entry: str) -> tuple[dict[str, int | None], bool]:
        """The shards of an entry in their order, with their sizes where a listing states them.

        Returns:
            Bytes by path, and whether these are all shards of one folder.

        Raises:
            ValueError: there are none.
        """
        if not is_remote(entry) and os.path.isfile(entry):
            return {entry: None}, False
        found, is_whole = self._candidates(entry)
        shards = {path: found[path] for path in sorted(found) if has_shard_name(path, self._kind)}
        if not shards:
            raise ValueError(
                f"no {_NOUNS[self._kind]} at '{entry}'; expected a file, a folder of "
                f"{_EXPECTED[self._kind]} files or a glob that matches some"
            )
        return shards, is_whole

    def describe(self, entry: str) -> list[Shard]:
        """The shards of an entry with what an index states of them.

        Raises:
            ValueError: there are none, or an index is damaged or stale.
        """
        shards, is_whole = self.list(entry)
        by_folder: dict[str, dict[str, int | None]] = {}
        for path, size in shards.items():
            by_folder.setdefault(os.path.dirname(path), {})[path] = size
        described: dict[str, Shard] = {}
        for folder, sizes in by_folder.items():
            index = self._index_of(folder) if self._kind in KINDS else None
            # A local file of any name can be given by its path.
            named = {path: sizes[path] for path in sizes if has_shard_name(path, self._kind)}
            if index is not None:
                self._check_fits(index.table, folder, named, is_whole)
                rows = [index.table.rows[os.path.basename(path)] for path in named]
                described.update(zip(named, _shards_of(index, folder, rows), strict=True))
            for path in sizes.keys() - described.keys():
                described[path] = Shard(path, sizes[path])
        return [described[path] for path in shards]

    def _candidates(self, entry: str) -> tuple[dict[str, int | None], bool]:
        """Files with their sizes, where these are known, and whether they are a whole folder."""
        if is_remote(entry):
            parent = os.path.dirname(entry)
            if self._entries_of[parent] > 1 and has_shard_name(entry, self._kind):
                listed = self._list_remote(parent)  # one request for all of them
                return {entry: listed[entry]} if entry in listed else {}, False
            listed = self._list_remote(entry)
            is_folder = not (entry in listed or is_glob(entry))
            if is_folder and listed:
                self._folders[os.path.dirname(next(iter(listed)))] = listed
            return listed, is_folder
        if os.path.isdir(entry):
            with os.scandir(entry) as listed:
                files = [file for file in listed if file.is_file()]
            has_index = any(file.name == INDEX_NAME for file in files)
            sizes = {file.path: file.stat().st_size if has_index else None for file in files}
            self._folders[entry.rstrip("/")] = sizes
            return sizes, True
        return dict.fromkeys(filter(os.path.isfile, glob.glob(entry, recursive=True))), False

    def _list_remote(self, url: str) -> dict[str, int | None]:
        if url not in self._folders:
            self._folders[url] = find_inputs(url)
        return self._folders[url]

    def _index_of(self, folder: str) -> IndexedOffsets | None:
        if folder not in self._indices:
            path, listed = os.path.join(folder, INDEX_NAME), self._folders.get(folder)
            table = None
            if listed is None or path in listed:
                with contextlib.suppress(FileNotFoundError):
                    table = read_table(path, listed and listed.get(path))
            self._indices[folder] = None if table is None else IndexedOffsets(table, path)
        return self._indices[folder]

    def _check_fits(
        self, table: ShardTable, folder: str, sizes: dict[str, int | None], is_whole: bool
    ) -> None:
        found = {
            os.path.basename(path): input_size(path) if size is None else size
            for path, size in sizes.items()
        }
        known = {
            name: num_bytes
            for name, kind, num_bytes in zip(
                table.names, table.kinds, table.num_bytes.tolist(), strict=True
            )
            if kind == self._kind
        }
        changes = describe_stale(known, found, is_whole)
        if changes:
            raise ValueError(
                f"{os.path.join(folder, INDEX_NAME)} does not fit the shards beside it: "
                f"{'; '.join(changes)}. If the shards are right, bring it up to date by "
                f"`{rebuild_command(folder)}`, which reads those shards only"
            )


def _entries(paths: Paths, kind: str) -> list[str]:
    entries = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not entries:
        raise ValueError(f"no {_NOUNS[kind]}: the list of paths is empty")
    return list(map(os.fspath, entries))


def _pack(entries: Sequence[str], found: Sequence[Sequence[Shard]]) -> bytes:
    """What the first process hands to the others; nothing of an entry that has no index."""
    indices: dict[int, IndexedOffsets] = {}
    parts: list[list[Any] | None] = []
    for shards in found:
        if any(shard.index is None for shard in shards):
            parts.append(None)
            continue
        parts.append([])  # folder, number of its index, rows
        for index, group in itertools.groupby(shards, key=lambda shard: shard.index):
            members = list(group)
            number = list(indices).index(id(index)) if id(index) in indices else len(indices)
            indices[id(index)] = index
            folder = os.path.dirname(members[0].path)
            parts[-1].append([folder, number, [shard.row for shard in members]])
    heads = [index.table.head for index in indices.values()]
    text = json.dumps({"entries": entries, "parts": parts, "heads": list(map(len, heads))}).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *heads])


def _unpack(packed: bytes, entries: Sequence[str], lister: _Lister) -> list[list[Shard]]:
    """The inverse of `_pack`, with the paths of this process.

    Raises:
        ValueError: a local index is another one than the first process has.
    """
    position = _LENGTH.size + _LENGTH.unpack_from(packed)[0]
    handed = json.loads(packed[_LENGTH.size : position])
    tables = []
    for size in handed["heads"]:
        tables.append(ShardTable(packed[position : position + size], "the first process's index"))
        position += size
    parts, theirs = handed["parts"], handed["entries"]
    if len(entries) != len(theirs):
        parts, theirs = [None] * len(entries), entries
    opened: dict[str, IndexedOffsets] = {}

    def shards_in(folder: str, number: int, rows: list[int]) -> list[Shard]:
        if folder not in opened:
            location = os.path.join(folder, INDEX_NAME)
            if not is_remote(location):
                check_same(location, tables[number])
            opened[folder] = IndexedOffsets(tables[number], location)
        return _shards_of(opened[folder], folder, rows)

    found = []
    for entry, their_entry, part in zip(entries, theirs, parts, strict=True):
        # A folder may be mounted under another name here.
        is_same = entry == their_entry
        is_folder = part and [group[0] for group in part] == [their_entry.rstrip("/")]
        if part is None or not (is_same or (is_folder and os.path.isdir(entry))):
            found.append(lister.describe(entry))
            continue
        groups = [(group[0] if is_same else entry.rstrip("/"), *group[1:]) for group in part]
        found.append([shard for group in groups for shard in shards_in(*group)])
    return found


def _shards_of(index: IndexedOffsets, folder: str, rows: Iterable[int]) -> list[Shard]:
    """Some shards of the folder of an index."""
    names, sizes = index.table.names, index.table.num_bytes.tolist()
    return [Shard(os.path.join(folder, names[row]), sizes[row], index, row) for row in rows]


def _read_offsets(location: str, offsets_start: int, begin: int, end: int) -> np.ndarray:
    """Some offsets of an index in a store, numbered through all shards."""
    data = read_range(location, offsets_start + 8 * begin, offsets_start + 8 * end)
    if len(data) != 8 * (end - begin):
        raise damaged(location, "it is cut off")
    return np.frombuffer(data, "<u8")
