"""The shards that a data set consists of, and where their records begin.

Where a folder has a `dataset.index`, one listing of the folder and the head of the index are all
that is looked at, for any number of shards. The listing shows whether the index still fits: shards
that are new, gone or of another size are an error.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import mimetypes
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence

from diht_jax.records.dataset_index import INDEX_NAME, KINDS, DatasetIndex, read_index
from diht_jax.records.format import FRAME_BYTES, framed_length
from diht_jax.storage.files import find_inputs, is_glob
from diht_jax.storage.stores import input_size, is_remote, open_local

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Bytes of files by path; None where no listing has stated them.
_Sizes = dict[str, int | None]

# By kind, as `config.output_format` names it; of a folder with several the first one is read.
SUFFIXES = {"tfrecord": ".tfrecord", "array_record": ".array_record", "webdataset": ".tar"}
# Both `name-00000.tfrecord` and TFDS's default `name.tfrecord-00000-of-00010`.
_NAMES = {
    "tfrecord": re.compile(r"[^.].*\.tfrecord(-\d{5,}(-of-\d{5,})?)?"),
    "array_record": re.compile(r"[^.].*\.array_record(-\d{5,}(-of-\d{5,})?)?"),
    "webdataset": re.compile(r"[^.].*\.(?i:tar)"),
}
_NOUNS = {"tfrecord": "TFRecord shard", "array_record": "ArrayRecord shard", "webdataset": "tar"}
# Why a file of another kind cannot be trained on, by the end of its name.
_NO_SHARDS = dict.fromkeys(
    (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    "a tar that is compressed has no random access; unpack it to a plain .tar, or make",
)
_NO_SHARDS |= {".parquet": "a parquet file has no random access by records; make"}
_NO_SHARDS |= dict.fromkeys((".csv", ".tsv", ".jsonl"), "a table is no record shard; make")
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
    index: DatasetIndex | None = None
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
    return [path for shards, _ in _Finder(paths, kind).found for path in shards]


def find_kind(paths: Paths) -> str:
    """The kind of the shards that some paths lead to; see `find_shards`."""
    return _Finder(paths).kind


def open_catalog(paths: Paths, kind: str | None = None) -> Catalog:
    """Finds shards, and the indices that describe them.

    Raises:
        ShardsNotFoundError: see `find_shards`.
        ValueError: an index is damaged or does not fit its folder.
    """
    finder = _Finder(paths, kind)
    return Catalog(finder.kind, finder.describe())


def kind_of(path: str) -> str | None:
    """The kind of a shard by its name alone; None where it is no name of a shard."""
    name = os.path.basename(path)
    return next((kind for kind, form in _NAMES.items() if form.fullmatch(name)), None)


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
        kind: of the shards.
        found: for each path that was given, the shards, and whether they are all of one folder.
    """

    def __init__(self, paths: Paths, kind: str | None = None):
        listed = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
        if not listed:
            raise ShardsNotFoundError(
                f"no {_NOUNS[kind or 'tfrecord']}: the list of paths is empty"
            )
        entries = [os.fspath(entry) for entry in listed]
        self._folders: dict[str, _Sizes] = {}  # those that were listed whole
        self._entries_of = collections.Counter(os.path.dirname(entry) for entry in entries)
        self._indices: dict[str, DatasetIndex | None] = {}
        files = [self._list(entry) for entry in entries]
        self.kind = kind or _shared_kind(dict(zip(entries, files, strict=True)))
        self.found: list[tuple[_Sizes, bool]] = []
        for entry, sizes in zip(entries, files, strict=True):
            shards = {path: sizes[path] for path in sorted(sizes) if self._is_meant(path, entry)}
            if not shards:
                raise ShardsNotFoundError(
                    f"no {_NOUNS[self.kind]} at '{entry}'; expected a file, a folder of "
                    f"*{SUFFIXES[self.kind]} files or a glob that matches some"
                )
            is_whole = any(sizes is whole for whole in self._folders.values())
            self.found.append((shards, is_whole))

    def describe(self) -> list[Shard]:
        """The shards with what indices state of them.

        Raises:
            ValueError: an index is damaged or stale.
        """
        shards: list[Shard] = []
        for found, is_whole in self.found:
            described = {path: Shard(path, size) for path, size in found.items()}
            for folder in dict.fromkeys(map(os.path.dirname, found)):
                index = self._index_of(folder) if self.kind in KINDS else None
                if index is None:
                    continue
                sizes = {
                    os.path.basename(path): input_size(path) if size is None else size
                    for path, size in found.items()
                    # A local file of any name can be given by its path.
                    if os.path.dirname(path) == folder and kind_of(path) == self.kind
                }
                known = index.sizes(self.kind)
                if changes := describe_stale(known, sizes, is_whole):
                    raise ValueError(
                        f"{index.path} does not fit the shards of its folder: "
                        f"{'; '.join(changes)}. If the shards are right, bring it up to date by "
                        f"`{index.rebuild_command}`, which reads those shards only"
                    )
                for name, size in sizes.items():
                    path = os.path.join(folder, name)
                    described[path] = Shard(path, size, index, index.rows[name])
            shards += described.values()
        return shards

    def _is_meant(self, path: str, entry: str) -> bool:
        return kind_of(path) == self.kind or (path == entry and not is_remote(path))

    def _list(self, entry: str) -> _Sizes:
        """The files that a path stands for."""
        if is_remote(entry):
            parent = os.path.dirname(entry)
            if self._entries_of[parent] > 1 and kind_of(entry) and not is_glob(entry):
                listed = self._list_remote(parent)  # one request for all of them
                return {entry: listed[entry]} if entry in listed else {}
            return self._list_remote(entry)
        if os.path.isfile(entry):
            return {entry: None}
        if os.path.isdir(entry):
            with os.scandir(entry) as listed:
                files = [file for file in listed if os.path.isfile(file)]
            has_index = any(file.name == INDEX_NAME for file in files)
            sizes = {file.path: file.stat().st_size if has_index else None for file in files}
            self._folders[entry.rstrip("/")] = sizes
            return sizes
        return dict.fromkeys(filter(os.path.isfile, glob.glob(entry, recursive=True)))

    def _list_remote(self, url: str) -> _Sizes:
        listed = self._folders.get(url) or find_inputs(url)
        if listed and url not in listed and not is_glob(url):
            self._folders[url] = self._folders[os.path.dirname(next(iter(listed)))] = listed
        return listed

    def _index_of(self, folder: str) -> DatasetIndex | None:
        path, listed = os.path.join(folder, INDEX_NAME), self._folders.get(folder)
        if listed is not None and path not in listed:
            return None
        if folder not in self._indices:
            try:
                self._indices[folder] = read_index(path, listed.get(path) if listed else None)
            except FileNotFoundError:
                self._indices[folder] = None
        return self._indices[folder]


def _shared_kind(files: Mapping[str, Iterable[str]]) -> str:
    """The kind of the shards among the files of some entries; of several, the first of each."""
    kinds: dict[str, str] = {}  # and an example of each
    for entry, paths in files.items():
        found = {kind_of(path) for path in paths}
        if found == {None}:
            _explain_others(entry, paths)
        kind = next((kind for kind in SUFFIXES if kind in found), None) or kind_of(entry)
        if kind is not None:
            kinds.setdefault(kind, entry)
    if len(kinds) > 1:
        raise ShardsNotFoundError(
            f"shards of several formats: {', '.join(kinds.values())} are {', '.join(kinds)}; name "
            f"those of one format, or convert the others by {_convert('OTHERS')}"
        )
    if not kinds and not any(map(os.path.isfile, files)):
        first = next(iter(files))
        convert = f". Pairs of other kinds become record shards by {_convert(first)}"
        raise ShardsNotFoundError(
            f"no TFRecord shard at '{first}', nor one of another format; expected a "
            f"file, a folder of {', '.join(f'*{suffix}' for suffix in SUFFIXES.values())} files, "
            f"or a glob that matches some{convert if os.path.isdir(first) else ''}"
        )
    for path in files if not kinds else ():  # a TFRecord shard may have any name
        if os.path.isfile(path):
            _refuse_others(path)
    return next(iter(kinds), "tfrecord")


def _refuse_others(path: str) -> None:
    """Raises ShardsNotFoundError for a file of an unknown name that begins as no shard does."""
    with open_local(path) as file:
        start = file.read(FRAME_BYTES)
    if not start or start.startswith(b"\x1f\x8b") or framed_length(start) is not None:
        return
    kind = mimetypes.guess_type(path)[0]
    raise ShardsNotFoundError(
        f"{path}: no record shard{f' but {kind}' if kind else ''}; expected files that end in "
        f"{', '.join(SUFFIXES.values())}, or a folder of them. Tars, tables, parquet files and "
        f"folders of pictures become record shards by {_convert('SOURCE')}"
    )


def _convert(source: str) -> str:
    return (
        "`python -m data_prep.filter --config prep/convert "
        f"--config.input={shlex.quote(source)} --config.output=FOLDER`"
    )


def _explain_others(entry: str, paths: Iterable[str]) -> None:
    """Raises ShardsNotFoundError where files are of a known kind that cannot be trained on."""
    for path in sorted(paths):
        for suffix, reason in _NO_SHARDS.items():
            if path.endswith(suffix):
                raise ShardsNotFoundError(
                    f"{path}: {reason} record shards of it by {_convert(entry)}"
                )
