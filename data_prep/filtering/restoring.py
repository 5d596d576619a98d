"""Records of parts that were cleaned away are copied back out of the output shards.

A complete job removes the records of its parts. When an input is added or removed, or the output is
to have other shards, the parts that are needed are written again from the shards that are there,
before these are replaced: nothing is filtered again.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep.captions.mentions import CONCEPTS_SUFFIX
from data_prep.filtering import resharding
from data_prep.filtering.resharding import BalancedShard, Slice
from data_prep.jobs import shards
from data_prep.jobs.engine import Report
from diht_jax.records.catalog import kind_of
from diht_jax.storage import files

# Of a tar the records do not come out as they went in.
_COPIED_FORMATS = ("tfrecord", "array_record")


def plan_restoring(
    parts: Sequence[resharding.Part], unwritten: Sequence[BalancedShard], folder: str
) -> tuple[list[BalancedShard], set[str]]:
    """Finds where the records are that new output shards need, and that no part has.

    Args:
        parts: all of them, with their statistics.
        unwritten: the new shards.
        folder: of the output.

    Returns:
        The parts that can be written again, as slices of old output shards; and the outputs of
        those some of whose records are nowhere.
    """
    needed = {piece.path for shard in unwritten for piece in shard.slices}
    lost = shards.damaged_outputs([part for part in parts if part[0].output in needed])
    found, missing = [], set()
    slices_of = _index_old_shards(parts, folder) if lost else {}
    for task, stats in parts:
        if task.output not in lost:
            continue
        slices = _cover(stats["output"]["records"], slices_of.get(task.output, ()))
        with_concepts = CONCEPTS_SUFFIX in stats["output"]["companions"]
        if slices is None or (with_concepts and not _have_concepts(slices)):
            missing.add(task.output)
        else:
            found.append(BalancedShard(task.output, slices, "", with_concepts))
    return found, missing


def restore_part(part: BalancedShard, report: Report) -> None:
    """Writes a part of `plan_restoring` again; a task of `engine.run_tasks`."""
    resharding.copy_records(part, report)


def _index_old_shards(
    parts: Sequence[resharding.Part], folder: str
) -> dict[str, list[tuple[int, Slice]]]:
    """Output of a part -> its records in old output shards: number of the first, and where."""
    known = {os.path.basename(task.output): (task.output, stats) for task, stats in parts}
    slices: dict[str, list[tuple[int, Slice]]] = collections.defaultdict(list)
    for shard, rows in _old_shards(folder):
        first = 0
        for name, start, stop, part_hash in rows:
            output, stats = known.get(name, ("", {}))
            # The part may have been made anew since.
            if output and resharding.hash_part(stats) == part_hash:
                slices[output].append((start, Slice(shard, first, first + stop - start)))
            first += stop - start
    return {output: sorted(found) for output, found in slices.items()}


def _old_shards(folder: str) -> Iterator[tuple[str, list[list[Any]]]]:
    """Path of each whole output shard that is there, and the slices of parts that it holds."""
    for name in files.list_names(folder, lambda name: name.endswith(shards.STATS_SUFFIX)):
        path = files.join(folder, name.removesuffix(shards.STATS_SUFFIX))
        if kind_of(path) not in _COPIED_FORMATS:
            continue
        stats = files.read_object(path + shards.STATS_SUFFIX) or {}
        rows = stats.get("input", {}).get("parts")
        if rows and stats["output"]["bytes"] == files.size(path):
            yield path, rows


def _cover(records: int, found: Sequence[tuple[int, Slice]]) -> tuple[Slice, ...] | None:
    """Locates all records of a part, in order; None if some are nowhere."""
    slices, position = [], 0
    for start, (path, first, last, _) in found:
        if start <= position < start + last - first:
            slices.append(Slice(path, first + position - start, last))
            position = start + last - first
    return tuple(slices) if position == records else None


def _have_concepts(slices: Sequence[Slice]) -> bool:
    return all(files.exists(piece.path + CONCEPTS_SUFFIX) for piece in slices)
