"""The shards that a data set consists of, and where their records begin.

Where a folder has a `dataset.index`, one listing of the folder and the head of the index are all
that is looked at, for any number of shards. The listing shows whether the index still fits:
shards that are new, gone or of another size are an error. Several processes of a run can share what
the first one has read; those that have a copy of the folder on a disk look at 24 bytes of their own
index, so that other files are noticed.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import glob
import itertools
import json
import os
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence

from diht_jax.records.dataset_index import (
    INDEX_NAME,
    KINDS,
    ShardTable,
    check_same,
    read_table,
    rebuild_command,
)
from diht_jax.records.indexed_offsets import IndexedOffsets
from diht_jax.storage.files import find_inputs, input_size, is_glob
from diht_jax.storage.stores import is_remote

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Calls a function in the first process of a run, and gives its result in all of them.
Share = Callable[[Callable[[], bytes]], bytes]

# By kind; of a folder with several kinds the first one is read.
SUFFIXES = {"tfrecord": ".tfrecord", "array_record": ".array_record", "tar": ".tar"}
# Both `name-00000.tfrecord` and TFDS's default `name.tfrecord-00000-of-00010`.
_NAMES = {
    "tfrecord": re.compile(r"[^.].*\.tfrecord(-\d{5,}(-of-\d{5,})?)?"),
    "array_record": re.compile(r"[^.].*\.array_record(-\d{5,}(-of-\d{5,})?)?"),
    "tar": re.compile(r"[^.].*\.tar"),
}
_NOUNS = {"tfrecord": "TFRecord shard", "array_record": "ArrayRecord shard", "tar": "tar"}
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LENGTH = struct.Struct("<Q")
_NAMES_SHOWN = 3


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


@dataclasses.dataclass(frozen=True)
class Catalog:
    """The shards of a data set, all of one kind, in their order."""

    kind: str
    shards: Sequence[Shard]


class ShardsNotFoundError(ValueError):
    """Some paths lead to no shards, to several kinds of them, or to compressed tars."""


def find_shards(paths: Paths, kind: str | None = None) -> list[str]:
    """Resolves a shard, a folder, a glob or a list of them to shard paths.

    Args:
        paths: what to look for; also URLs such as `gs://bucket/folder`.
        kind: of the shards, a key of `SUFFIXES`; None takes the first kind that is found, in their
            order.

    Returns:
        Paths, sorted within each folder or glob, in the order of the list.

    Raises:
        ShardsNotFoundError: an entry matches no shard, or kinds differ.
    """
    return [path for shards, _ in _Finder(paths, kind).find() for path in shards]


def find_kind(paths: Paths) -> str:
    """The kind of the shards that some paths lead to; see `find_shards`."""
    finder = _Finder(paths, None)
    finder.find()
    return finder.kind


def open_catalog(paths: Paths, kind: str | None = None, share: Share | None = None) -> Catalog:
    """Finds shards, and the indices that describe them.

    Args:
        paths: see `find_shards`.
        kind: see `find_shards`.
        share: for a run of several processes, all of which must call. Where all shards have an
            index, the first process alone lists and reads them.

    Raises:
        ShardsNotFoundError: see `find_shards`.
        ValueError: an index is damaged or does not fit its folder.
    """
    finder = _Finder(paths, kind)
    if share is None:
        return finder.describe()
    found: list[Catalog] = []

    def read() -> bytes:
        found.append(finder.describe())
        return _pack(finder.entries, found[0])

    packed = share(read)
    return found[0] if found else (_unpack(packed, finder.entries) or finder.describe())


def kind_of(path: str) -> str | None:
    """The kind of a shard by its name alone; None where it is no name of a shard."""
    name = os.path.basename(path)
    return next((kind for kind, form in _NAMES.items() if form.fullmatch(name)), None)


def has_shard_name(path: str, kind: str = "tfrecord") -> bool:
    """Returns whether a path ends like that of a shard."""
    return kind_of(path) == kind


def is_shard(path: str, kind: str = "tfrecord") -> bool:
    """Returns whether a path is a file named like a shard; a URL is taken at its name."""
    return has_shard_name(path, kind) and (is_remote(path) or os.path.isfile(path))


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
    """Differences between shards and what an index states of them, in words; empty where it fits.

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


class _Finder:
    """Finds shards; lists each folder once, and reads each index once.

    Attributes:
        entries: paths, folders and globs.
        kind: of the shards; set by `find` where it was None.
    """

    def __init__(self, paths: Paths, kind: str | None):
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not listed:
            raise ShardsNotFoundError(
                f"no {_NOUNS[kind or 'tfrecord']}: the list of paths is empty"
            )
        self.entries = list(map(os.fspath, listed))
        self.kind = kind
        self._folders: dict[str, dict[str, int | None]] = {}
        self._entries_of = collections.Counter(map(os.path.dirname, self.entries))

    def find(self) -> list[tuple[dict[str, int | None], bool]]:
        """The shards of each entry in their order, with sizes where a listing states them.

        Returns:
            For each entry, bytes by path, and whether these are all shards of one folder.
        """
        listed = [(entry, *self._list(entry)) for entry in self.entries]
        if self.kind is None:
            self.kind = _shared_kind({entry: files for entry, files, _ in listed})
        found = []
        for entry, files, is_whole in listed:
            shards = {path: files[path] for path in sorted(files) if self._is_meant(path, entry)}
            if not shards:
                raise ShardsNotFoundError(
                    f"no {_NOUNS[self.kind]} at '{entry}'; expected a file, a folder of "
                    f"*{SUFFIXES[self.kind]} files or a glob that matches some"
                )
            found.append((shards, is_whole))
        return found

    def describe(self) -> Catalog:
        """The shards with what indices state of them.

        Raises:
            ValueError: an index is damaged or stale.
        """
        shards: list[Shard] = []
        for found, is_whole in self.find():
            by_folder: dict[str, dict[str, int | None]] = {}
            for path, size in found.items():
                by_folder.setdefault(os.path.dirname(path), {})[path] = size
            described: dict[str, Shard] = {}
            for folder, sizes in by_folder.items():
                described.update(self._describe_folder(folder, sizes, is_whole))
            shards += [described[path] for path in found]
        return Catalog(self.kind, shards)

    def _describe_folder(
        self, folder: str, sizes: Mapping[str, int | None], is_whole: bool
    ) -> dict[str, Shard]:
        """Some shards of a folder by their paths."""
        described = {path: Shard(path, size) for path, size in sizes.items()}
        index = self._index_of(folder) if self.kind in KINDS else None
        if index is not None:
            # A local file of any name can be given by its path.
            named = {path: sizes[path] for path in sizes if has_shard_name(path, self.kind)}
            self._check_fits(index.table, folder, named, is_whole)
            rows = [index.table.rows[os.path.basename(path)] for path in named]
            described.update(zip(named, _shards_of(index, folder, rows), strict=True))
        return described

    def _is_meant(self, path: str, entry: str) -> bool:
        return has_shard_name(path, self.kind) or (path == entry and not is_remote(path))

    def _list(self, entry: str) -> tuple[dict[str, int | None], bool]:
        """Files with their sizes, where these are known, and whether they are a whole folder."""
        if is_remote(entry):
            parent = os.path.dirname(entry)
            if self._entries_of[parent] > 1 and kind_of(entry) and not is_glob(entry):
                listed = self._list_remote(parent)  # one request for all of them
                return {entry: listed[entry]} if entry in listed else {}, False
            listed = self._list_remote(entry)
            is_folder = not (entry in listed or is_glob(entry))
            if is_folder and listed:
                self._folders[os.path.dirname(next(iter(listed)))] = listed
            return listed, is_folder
        if os.path.isfile(entry):
            return {entry: None}, False
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

    @functools.cache  # noqa: B019 - a finder lives as long as a call
    def _index_of(self, folder: str) -> IndexedOffsets | None:
        path, listed = os.path.join(folder, INDEX_NAME), self._folders.get(folder)
        if listed is not None and path not in listed:
            return None
        try:
            return IndexedOffsets(read_table(path, listed and listed.get(path)), path)
        except FileNotFoundError:
            return None

    def _check_fits(
        self, table: ShardTable, folder: str, sizes: Mapping[str, int | None], is_whole: bool
    ) -> None:
        found = {
            os.path.basename(path): input_size(path) if size is None else size
            for path, size in sizes.items()
        }
        rows = zip(table.names, table.kinds, table.num_bytes.tolist(), strict=True)
        known = {name: num_bytes for name, kind, num_bytes in rows if kind == self.kind}
        changes = describe_stale(known, found, is_whole)
        if changes:
            raise ValueError(
                f"{os.path.join(folder, INDEX_NAME)} does not fit the shards of its folder: "
                f"{'; '.join(changes)}. If the shards are right, bring it up to date by "
                f"`{rebuild_command(folder)}`, which reads those shards only"
            )


def _shared_kind(files: Mapping[str, Iterable[str]]) -> str:
    """The kind of the shards among the files of some entries; of several, the first of each."""
    kinds: dict[str, str] = {}  # and an example of each
    for entry, paths in files.items():
        found = {kind_of(path) for path in paths}
        compressed = [path for path in paths if path.endswith(_COMPRESSED_TARS)]
        if compressed and found == {None}:
            raise ShardsNotFoundError(
                f"{compressed[0]}: a tar that is compressed has no random access; unpack it to a "
                "plain .tar, or make record shards of it by `python -m data_prep.filter --config "
                "configs/prep/convert.py`"
            )
        kind = next((kind for kind in SUFFIXES if kind in found), None) or kind_of(entry)
        if kind is not None:
            kinds.setdefault(kind, entry)
    if len(kinds) > 1:
        raise ShardsNotFoundError(
            f"shards of several formats: {', '.join(kinds.values())} are {', '.join(kinds)}; name "
            "those of one format, or convert the others by `python -m data_prep.filter --config "
            "configs/prep/convert.py`"
        )
    if not kinds and not any(map(os.path.isfile, files)):
        raise ShardsNotFoundError(
            f"no TFRecord shard at '{next(iter(files))}', nor one of another format; expected a "
            f"file, a folder of {', '.join(f'*{suffix}' for suffix in SUFFIXES.values())} files, "
            "or a glob that matches some"
        )
    return next(iter(kinds), "tfrecord")  # a single file may have any name


def _pack(entries: Sequence[str], catalog: Catalog) -> bytes:
    """The message of the first process to the others; nothing where a shard has no index."""
    if any(shard.index is None for shard in catalog.shards):
        return b""
    indices = list({id(shard.index): shard.index for shard in catalog.shards}.values())
    numbers = {id(index): number for number, index in enumerate(indices)}
    groups = [
        [numbers[key], [shard.row for shard in members]]
        for key, members in itertools.groupby(catalog.shards, key=lambda shard: id(shard.index))
    ]
    heads = [index.table.head for index in indices]
    facts = {
        "entries": entries,
        "kind": catalog.kind,
        "groups": groups,
        "locations": [index.location for index in indices],
        "heads": list(map(len, heads)),
    }
    text = json.dumps(facts).encode()
    return b"".join([_LENGTH.pack(len(text)), text, *heads])


def _unpack(packed: bytes, entries: Sequence[str]) -> Catalog | None:
    """The inverse of `_pack`; None where this process must look for itself.

    Raises:
        ValueError: a local index is another one than the first process has.
    """
    if not packed:
        return None
    position = _LENGTH.size + _LENGTH.unpack_from(packed)[0]
    handed = json.loads(packed[_LENGTH.size : position])
    if handed["entries"] != list(entries):  # a folder is mounted under another name here
        return None
    indices = []
    for location, size in zip(handed["locations"], handed["heads"], strict=True):
        table = ShardTable(packed[position : position + size], "the first process's index")
        position += size
        if not is_remote(location):
            check_same(location, table)
        indices.append(IndexedOffsets(table, location))
    shards = [
        shard
        for number, rows in handed["groups"]
        for shard in _shards_of(indices[number], os.path.dirname(indices[number].location), rows)
    ]
    return Catalog(handed["kind"], shards)


def _shards_of(index: IndexedOffsets, folder: str, rows: Iterable[int]) -> list[Shard]:
    """Some shards of the folder of an index."""
    names, sizes = index.table.names, index.table.num_bytes.tolist()
    return [Shard(os.path.join(folder, names[row]), sizes[row], index, row) for row in rows]
