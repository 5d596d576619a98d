"""The shards of a data set, and where their records begin.

If a folder has a `dataset.index`, only the folder's listing and the head of the index are read, for
any number of shards. The listing is compared with the index: new, missing or resized shards are an
error.
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from diht_jax.records.dataset_index import (
    INDEX_NAME,
    DatasetIndex,
    read_index,
    rebuild_command,
)
from diht_jax.records.shard_files import FRAME_BYTES, SUFFIXES, framed_length, kind_of
from diht_jax.storage.files import find_inputs, is_glob
from diht_jax.storage.stores import input_size, is_remote, listed_url, open_local

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
# Path -> bytes of a file, or None if no listing has stated the size.
_Sizes = dict[str, int | None]

_NOUNS = {"tfrecord": "TFRecord shard", "array_record": "ArrayRecord shard", "webdataset": "tar"}
_NAMES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard of a data set."""

    path: str  # path or URL
    num_bytes: int | None = None  # size of the file, if a listing or an index states it
    index: DatasetIndex | None = None  # the `dataset.index` that describes the shard, if any
    row: int = -1  # row of the shard in `index`


class ShardsNotFoundError(ValueError):
    """Some paths match no shards, shards of several kinds, or compressed tars."""


def find_shards(paths: Paths, kind: str | None = None) -> list[str]:
    """Resolves a shard, a folder, a glob or a list of them to shard paths.

    Args:
        paths: what to look for; also URLs such as `gs://bucket/folder`.
        kind: kind of the shards, a key of `SUFFIXES`. None selects the first kind in the order of
            `SUFFIXES` that is found.

    Returns:
        Paths, sorted within each folder or glob, in the order of the list.

    Raises:
        ShardsNotFoundError: an entry matches no shard, or kinds differ.
    """
    return [path for _, shards in _find(paths, kind, {})[1] for path in shards]


def find_kind(paths: Paths) -> str:
    """Returns the kind of the shards that some paths resolve to; see `find_shards`."""
    return _find(paths, None, {})[0]


def open_catalog(paths: Paths, kind: str | None = None) -> tuple[str, list[Shard]]:
    """Finds shards, and the indices that describe them; returns their kind and them, in order.

    Raises:
        ShardsNotFoundError: see `find_shards`.
        ValueError: an index is damaged or does not match its folder.
    """
    folders: dict[str, _Sizes] = {}
    kind, found = _find(paths, kind, folders)
    indices: dict[str, DatasetIndex | None] = {}
    shards: list[Shard] = []
    for entry, sizes in found:
        described = {path: Shard(path, size) for path, size in sizes.items()}
        for folder in dict.fromkeys(map(os.path.dirname, sizes)):
            if folder not in indices:
                path, listed = os.path.join(folder, INDEX_NAME), folders.get(folder)
                indices[folder] = None
                if listed is None or path in listed:
                    indices[folder] = read_index(folder, listed[path] if listed else None)
            # A path may name a local file without a shard's suffix.
            own = {
                path: size
                for path, size in sizes.items()
                if os.path.dirname(path) == folder and kind_of(path) == kind
            }
            if (index := indices[folder]) is not None:
                rows = _match(index, kind, own, is_whole=entry.rstrip("/") in folders)
                described |= {row.path: row for row in rows}
        shards += described.values()
    return kind, shards


def describe_stale(known: Mapping[str, Any], found: Mapping[str, Any], is_whole: bool) -> list[str]:
    """Describes in words how shards differ from an earlier record of them; empty if they match.

    Both arguments map names to bytes or other facts. `is_whole` means that `found` is complete.
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


def _find(
    paths: Paths, kind: str | None, folders: dict[str, _Sizes]
) -> tuple[str, list[tuple[str, _Sizes]]]:
    """Returns the kind and the shards of each path; records listed folders in `folders`."""
    given = [paths] if isinstance(paths, str | os.PathLike) else paths
    entries = [os.fspath(entry) for entry in given]
    entries = [listed_url(entry) if is_remote(entry) else entry for entry in entries]
    if not entries:
        raise ShardsNotFoundError(f"no {_NOUNS[kind or 'tfrecord']}: the list of paths is empty")
    siblings = collections.Counter(map(os.path.dirname, entries))
    files = [(entry, _list(entry, folders, siblings)) for entry in entries]
    kind = kind or _shared_kind(files)
    found = []
    for entry, sizes in files:
        own = {}
        for path in sorted(sizes):
            if kind_of(path) == kind or (path == entry and not is_remote(path)):
                own[path] = sizes[path]
        found.append((entry, own))
        if not own:
            raise ShardsNotFoundError(
                f"no {_NOUNS[kind]} at '{entry}'; expected a file, a folder of "
                f"*{SUFFIXES[kind]} files or a glob that matches some"
            )
    return kind, found


def _list(entry: str, folders: dict[str, _Sizes], siblings: Mapping[str, int]) -> _Sizes:
    """Returns the files that a path, folder, glob or URL stands for."""
    if not is_remote(entry):
        if os.path.isfile(entry):
            return {entry: None}
        if os.path.isdir(entry):
            with os.scandir(entry) as listed:
                found = dict.fromkeys(map(os.fspath, filter(os.path.isfile, listed)))
            folders[entry.rstrip("/")] = found
            return found
        return dict.fromkeys(filter(os.path.isfile, glob.glob(entry, recursive=True)))
    parent = os.path.dirname(entry)
    if siblings[parent] > 1 and kind_of(entry) and not is_glob(entry):
        listed = _list(parent, folders, collections.Counter())  # one request for all of them
        return {entry: listed[entry]} if entry in listed else {}
    listed = folders.get(entry) or find_inputs(entry)
    if listed and entry not in listed and not is_glob(entry):
        folders[entry.rstrip("/")] = folders[os.path.dirname(next(iter(listed)))] = listed
    return listed


def _match(index: DatasetIndex, kind: str, found: _Sizes, is_whole: bool) -> list[Shard]:
    """Returns the shards of an index's folder, with their rows; ValueError for a stale index."""
    sizes = {
        os.path.basename(path): input_size(path) if size is None else size
        for path, size in found.items()
    }
    if changes := describe_stale(index.sizes(kind), sizes, is_whole):
        raise ValueError(
            f"{index.path} does not fit the shards of its folder: {'; '.join(changes)}. If the "
            f"shards are right, bring it up to date by `{rebuild_command(index.path)}`, which "
            "reads those shards only"
        )
    return [
        Shard(path, size, index, index.rows[name])
        for path, (name, size) in zip(found, sizes.items(), strict=True)
    ]


def _shared_kind(files: Sequence[tuple[str, _Sizes]]) -> str:
    """Returns the kind of all shards; of an entry with several kinds, the first in `SUFFIXES`."""
    kinds: dict[str, str] = {}  # kind -> an example
    for entry, paths in files:
        found = set(map(kind_of, paths))
        kind = next((kind for kind in SUFFIXES if kind in found), None) or kind_of(entry)
        # A TFRecord shard may have any name.
        if kind is None and (is_remote(entry) or entry not in paths or _is_foreign(entry)):
            raise ShardsNotFoundError(
                f"no record shard at '{entry}'; expected uncompressed files that end in "
                f"{', '.join(SUFFIXES.values())}, a folder of them or a glob that matches some. "
                "Compressed tars, tables, parquet files and folders of pictures become record "
                f"shards by {_convert(entry)}"
            )
        kinds.setdefault(kind or "tfrecord", entry)
    if len(kinds) > 1:
        raise ShardsNotFoundError(
            f"shards of several formats: {', '.join(kinds.values())} are {', '.join(kinds)}; name "
            f"those of one format, or convert the others by {_convert('OTHERS')}"
        )
    return next(iter(kinds))


def _is_foreign(path: str) -> bool:
    with open_local(path) as file:
        start = file.read(FRAME_BYTES)
    return bool(start) and framed_length(start) is None


def _convert(source: str) -> str:
    return (
        "`python -m data_prep.filter --config prep/convert "
        f"--config.input={shlex.quote(source)} --config.output=FOLDER`"
    )
