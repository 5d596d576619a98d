"""Records of parts that were cleaned away are found in the output shards that were made of them.

A complete job removes the records of its parts. When an input is added or removed, or the output is
to have other shards, the records are copied out of the shards that are there: nothing is filtered
again. The old shards are moved to `parts/previous` first, and removed when the new ones are
written.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from data_prep.captions.mentions import CONCEPTS_SUFFIX
from data_prep.filtering import resharding
from data_prep.filtering.resharding import BalancedShard, Piece, Slice
from data_prep.jobs import shards
from diht_jax.records.formats.registry import name_format
from diht_jax.records.formats.shard_index import INDEX_SUFFIX
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote

# Of a tar the records do not come out as they went in.
_COPIED_FORMATS = ("tfrecord", "array_record")


class _Stretch(NamedTuple):
    """Records of a part from `start` on, before `stop`, which begin at `first` in a shard."""

    start: int
    stop: int
    path: str
    first: int


def find_records(
    parts: Sequence[resharding.Part], unwritten: Sequence[BalancedShard], folder: str
) -> tuple[Sequence[BalancedShard], set[str]]:
    """Finds where the records of new output shards are now.

    Args:
        parts: all of them, with their statistics.
        unwritten: the new shards.
        folder: of the output.

    Returns:
        The same shards, which know where their records are; and the parts some of whose records
        are nowhere.
    """
    needed = {piece.path for shard in unwritten for piece in shard.slices}
    lost = shards.damaged_outputs([part for part in parts if part[0].output in needed])
    if not lost:
        return unwritten, set()
    stretches = _index_old_shards(parts, folder)
    found, missing = [], set()
    for shard in unwritten:
        slices = []
        for piece in shard.slices:
            if piece.path in lost:
                name = os.path.basename(piece.path)
                pieces = _cover(piece, stretches.get(name, ()))
                if pieces is None or (shard.with_concepts and not _have_concepts(pieces)):
                    missing.add(piece.path)
                    continue
                piece = dataclasses.replace(piece, pieces=pieces)
            slices.append(piece)
        found.append(dataclasses.replace(shard, slices=tuple(slices)))
    return found, missing


def move_aside(found: Sequence[BalancedShard], folder: str) -> Sequence[BalancedShard]:
    """Moves the old shards out of the way of the new ones.

    Args:
        found: of `find_records`.
        folder: of the output.

    Returns:
        The same shards, which know where their records are now.
    """
    used = {p.path for shard in found for piece in shard.slices for p in piece.pieces}
    if not used:
        return found
    new_paths = {}
    for path in sorted(used):
        if path.rpartition("/")[0] == folder.rstrip("/"):
            config_hash = shards.read_json(path + shards.STATS_SUFFIX)["config_hash"]
            new_paths[path] = _previous_path(folder, config_hash, os.path.basename(path))
    if new_paths:
        files.make_folder(_previous_folder(folder))
    for path, new in new_paths.items():
        # With its statistics there, a move that is interrupted is gone on with.
        files.write_bytes(new + shards.STATS_SUFFIX, files.read_bytes(path + shards.STATS_SUFFIX))
        _move(path, new)

    def moved(piece: Slice) -> Slice:
        pieces = (p._replace(path=new_paths.get(p.path, p.path)) for p in piece.pieces)
        return dataclasses.replace(piece, pieces=tuple(pieces))

    return [dataclasses.replace(s, slices=tuple(map(moved, s.slices))) for s in found]


def remove_previous(folder: str) -> None:
    """Removes the old shards, once the new ones are written."""
    previous = _previous_folder(folder)
    for name in files.list_names(previous):
        files.remove(files.join(previous, name))
    if not is_remote(previous):
        with contextlib.suppress(OSError):
            os.rmdir(previous)


def _previous_folder(folder: str) -> str:
    return files.join(folder, resharding.PARTS, resharding.PREVIOUS)


def _previous_path(folder: str, config_hash: str, name: str) -> str:
    return files.join(_previous_folder(folder), f"{config_hash}-{name}")


def _move(path: str, new: str) -> None:
    for suffix in (INDEX_SUFFIX, CONCEPTS_SUFFIX, ""):
        files.rename(path + suffix, new + suffix)
    files.remove(path + shards.STATS_SUFFIX)


def _index_old_shards(parts: Sequence[resharding.Part], folder: str) -> dict[str, list[_Stretch]]:
    """Name of a part -> its records in old output shards, sorted."""
    stats_of = {os.path.basename(task.output): stats for task, stats in parts}
    stretches: dict[str, list[_Stretch]] = collections.defaultdict(list)
    for shard, rows in _old_shards(folder):
        first = 0
        for name, start, stop, identity in rows:
            # Its part may have been made anew since.
            if name in stats_of and resharding.hash_part(stats_of[name]) == identity:
                stretches[name].append(_Stretch(start, stop, shard, first))
            first += stop - start
    return {name: sorted(found) for name, found in stretches.items()}


def _old_shards(folder: str) -> Iterable[tuple[str, list[list[Any]]]]:
    """Path and slices of the shards of earlier plans; an interrupted move is finished first."""
    previous = _previous_folder(folder)
    for name in files.list_names(previous):
        if name.endswith(shards.STATS_SUFFIX):
            config_hash, _, shard = name.removesuffix(shards.STATS_SUFFIX).partition("-")
            path = files.join(folder, shard)
            stats = files.read_object(path + shards.STATS_SUFFIX) or {}
            if stats.get("config_hash") == config_hash:
                _move(path, _previous_path(folder, config_hash, shard))
    for where in (folder, previous):
        for name in files.list_names(where):
            path = files.join(where, name.removesuffix(shards.STATS_SUFFIX))
            if path.endswith(name) or name_format(path) not in _COPIED_FORMATS:
                continue
            stats = files.read_object(files.join(where, name)) or {}
            slices = stats.get("input", {}).get("parts")
            if slices and stats["output"]["bytes"] == files.size(path):
                yield path, slices


def _cover(piece: Slice, stretches: Sequence[_Stretch]) -> tuple[Piece, ...] | None:
    """Locates all records of a slice, in order; None if some are nowhere."""
    pieces, position = [], piece.start
    for start, stop, path, first in stretches:
        if start <= position < stop:
            end = min(stop, piece.stop)
            pieces.append(Piece(path, first + position - start, first + end - start))
            position = end
            if position == piece.stop:
                return tuple(pieces)
    return None


def _have_concepts(pieces: Sequence[Piece]) -> bool:
    return all(files.exists(piece.path + CONCEPTS_SUFFIX) for piece in pieces)
