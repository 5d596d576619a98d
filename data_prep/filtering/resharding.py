"""Resharding: writes the parts of all input shards as output shards of equal size.

The plan is made after all parts are done, and every output shard is a task. Records keep the order
of the input, and shard sizes differ by at most one record. A task reads consecutive records from
one or several parts, one record at a time. Output shards that were already written from the same
parts are kept.

A complete job removes the records of its parts. When an input is added or removed, or the output
shards change, the required parts are restored from the existing output shards before these are
replaced. Nothing is filtered again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from data_prep import sources
from data_prep.captions.mentions import CONCEPTS_SUFFIX, ConceptLog, read_mentions
from data_prep.decisions.table import SUFFIX, decisions_path, read_kept
from data_prep.filtering.config import SETTINGS
from data_prep.jobs import shards
from data_prep.jobs.engine import Report
from data_prep.jobs.failures import damaged_outputs, has_output, open_sizes
from data_prep.jobs.shards import STATS_SUFFIX
from diht_jax.input import transforms
from diht_jax.records import schema
from diht_jax.records.formats import open_source, open_writer
from diht_jax.records.shard_files import INDEX_SUFFIX, SUFFIXES, kind_of, shard_name
from diht_jax.records.tar_records import image_extension
from diht_jax.records.vocabulary import KINDS
from diht_jax.storage import files
from diht_jax.storage.copies import local_copy
from diht_jax.storage.stores import BLOCK_BYTES, is_remote, read_range

PARTS = "parts"

Part = tuple[shards.ShardTask, Mapping[str, Any]]  # with its statistics

_OF_RECORDS = ("", CONCEPTS_SUFFIX, INDEX_SUFFIX)  # suffixes of the files with a part's records
# Formats that return records unchanged; webdataset does not.
_COPIED_FORMATS = ("tfrecord", "array_record")


class Slice(NamedTuple):
    """Consecutive records of a file, from `start` up to but excluding `stop`.

    Attributes:
        path: path of a part, or of an output shard from which a part is restored.
        start, stop: record numbers in the file.
        part_hash: hash of the records of the part.
    """

    path: str
    start: int
    stop: int
    part_hash: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class BalancedShard:
    """One output shard.

    Attributes:
        slices: the non-empty slices of parts that it consists of, in order.
        plan_hash: hash of the slices and of the contents of their parts.
        with_concepts: whether the parts have files of concepts.
    """

    output: str
    slices: tuple[Slice, ...]
    plan_hash: str
    with_concepts: bool

    @property
    def source(self) -> str:
        """A name for messages."""
        return f"records for {os.path.basename(self.output)}"


def plan_shards(
    parts: Sequence[Part], folder: str, config: ml_collections.ConfigDict
) -> list[BalancedShard]:
    """Divides the records of all parts, in order, among at least one output shard.

    The number of shards is the number of records divided by `examples_per_shard`, rounded up.
    """
    records, with_concepts = np.zeros(len(parts), np.int64), True
    for i, (_, stats) in enumerate(parts):
        records[i] = stats["output"]["records"]
        with_concepts &= CONCEPTS_SUFFIX in stats["output"]["companions"]
    ends = np.cumsum(records)
    total = int(ends[-1]) if len(ends) else 0
    count = max(1, -(-total // config.examples_per_shard))

    def plan(number: int) -> BalancedShard:
        first, last = total * number // count, total * (number + 1) // count
        begin, end = np.searchsorted(ends, [first, last - 1], side="right") if total else (0, -1)
        slices, taken = [], []
        for i in range(int(begin), int(end) + 1):
            task, stats = parts[i]
            offset = int(ends[i] - records[i])
            start, stop = max(first - offset, 0), min(last - offset, int(records[i]))
            if start < stop:
                slices.append(Slice(task.output, start, stop, _hash_part(stats)))
                taken.append([_identify(stats), start, stop])
        suffix = SUFFIXES[config.output_format]
        name = shard_name(config.dataset_name, config.split, number, count, suffix)
        plan_hash = shards.hash_config(
            {
                "output_format": config.output_format,
                "slices": taken,
                "with_concepts": with_concepts,
            }
        )
        return BalancedShard(files.join(folder, name), tuple(slices), plan_hash, with_concepts)

    return list(map(plan, range(count)))


def _identify(stats: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the identity of the records of a part, independent of its location."""
    output = stats["output"]
    found = {"config": stats["config_hash"], "records": output["records"]}
    return found | {"digest": output["digest"]}


def _hash_part(stats: Mapping[str, Any]) -> str:
    return shards.hash_config(_identify(stats))


def write_shard(shard: BalancedShard, report: Report) -> None:
    """Writes one output shard and its statistics; a task of `run_pending`.

    Raises:
        ValueError: a part is damaged or gone.
    """
    files.remove(shard.output + STATS_SUFFIX)
    records, concepts = copy_records(shard, report)
    formats: collections.Counter[str] = collections.Counter()
    for part in shard.slices:
        found = (rows["format"].to_pylist() for rows in read_kept([part.path], ["format"]))
        formats.update(itertools.islice(itertools.chain(*found), part.start, part.stop))
    counts: dict[str, Any] = {"image_formats": dict(sorted(formats.items()))}
    if shard.with_concepts:
        counts["concepts"] = concepts.counts()
    stats = {
        "config_hash": shard.plan_hash,
        "input": {"parts": [[os.path.basename(s.path), *s[1:]] for s in shard.slices]},
        "output": shards.describe_output(
            shard.output, records, (CONCEPTS_SUFFIX,) if shard.with_concepts else ()
        ),
        "counts": counts,
    }
    files.write_object(shard.output + STATS_SUFFIX, stats, with_checksum=True)


def copy_records(shard: BalancedShard, report: Report) -> tuple[int, ConceptLog]:
    """Writes the records of the slices of a shard; for a restored part a task of `run_pending`.

    Returns:
        The number of records, and the concepts named in their captions.
    """
    concepts = ConceptLog()
    is_tar = kind_of(shard.output) == "webdataset"
    with open_writer(shard.output) as writer:
        for piece in shard.slices:
            for data in _read_slice(piece):
                writer.write(with_common_image(data) if is_tar else data)
                report(1)
            if shard.with_concepts:
                _copy_mentions(piece, concepts)
        if shard.with_concepts:
            concepts.write(shard.output + CONCEPTS_SUFFIX)
    return len(writer), concepts


def _read_slice(piece: Slice) -> Iterator[bytes]:
    """Yields the records of a slice; from a store in requests of about one block."""
    if not is_remote(piece.path) or kind_of(piece.path) == "array_record":
        with local_copy(piece.path) as path:
            source = open_source(path)
            yield from (source[number] for number in range(piece.start, piece.stop))
        return
    source = open_source(piece.path)
    _, begin, end = source.extent(piece.start, piece.stop)
    step = max(1, (piece.stop - piece.start) * BLOCK_BYTES // (end - begin))
    for first in range(piece.start, piece.stop, step):
        last = min(first + step, piece.stop)
        yield from source.split(first, last, read_range(*source.extent(first, last)))


def _copy_mentions(piece: Slice, concepts: ConceptLog) -> None:
    """Adds the concepts named in the captions of each record of a slice."""
    rows = {}
    for kind in KINDS:
        names, lengths, ids = read_mentions(piece.path, kind)
        ends = np.cumsum(lengths)
        rows[kind] = [
            frozenset(names[i] for i in ids[ends[number] - lengths[number] : ends[number]])
            for number in range(piece.start, piece.stop)
        ]
    for mentions in zip(*rows.values(), strict=True):
        concepts.add(dict(zip(rows, mentions, strict=True)))


def with_common_image(data: bytes) -> bytes:
    """Returns a record for a tar: an image format unknown to webdataset is converted to PNG."""
    record = schema.decode_record(data)
    if image_extension(record.image) is not None:
        return data
    # The filter has already accepted the number of pixels.
    image = transforms.decode_rgb(record.image, max_pixels=sys.maxsize)
    png = transforms.encode(image, "PNG")
    return schema.encode_record(dataclasses.replace(record, image=png))


def load_written(planned: Sequence[BalancedShard]) -> Iterator[dict[str, Any]]:
    """Yields the statistics of each shard already written from the same parts, else `{}`."""
    if not planned:
        return
    sizes = open_sizes(planned[0].output.rpartition("/")[0])

    def load(shard: BalancedShard) -> dict[str, Any]:
        stats = files.read_object(shard.output + STATS_SUFFIX) or {}
        is_same = stats.get("config_hash") == shard.plan_hash
        return stats if is_same and has_output(shard.output, stats, sizes) else {}

    yield from files.map_many(load, planned, planned[0].output)


def plan_restoring(
    parts: Sequence[Part], unwritten: Sequence[BalancedShard], folder: str
) -> tuple[list[BalancedShard], set[str]]:
    """Finds old output shards with the records that new shards need and damaged parts lack.

    Returns:
        The parts that can be restored, as slices of old output shards; and the output paths of the
        parts that cannot be restored completely.
    """
    needed = {piece.path for shard in unwritten for piece in shard.slices}
    lost = damaged_outputs([part for part in parts if part[0].output in needed])
    found, missing = [], set()
    pieces_of = _index_old_shards(parts, folder) if lost else {}
    for task, stats in parts:
        if task.output not in lost:
            continue
        slices, position = [], 0
        for start, (path, first, last, _) in pieces_of.get(task.output, ()):
            if start <= position < start + last - first:
                slices.append(Slice(path, first + position - start, last))
                position = start + last - first
        with_concepts = CONCEPTS_SUFFIX in stats["output"]["companions"]
        is_whole = position == stats["output"]["records"]
        if with_concepts:
            is_whole &= all(files.exists(piece.path + CONCEPTS_SUFFIX) for piece in slices)
        if is_whole:
            found.append(BalancedShard(task.output, tuple(slices), "", with_concepts))
        else:
            missing.add(task.output)
    return found, missing


def _index_old_shards(parts: Sequence[Part], folder: str) -> dict[str, list[tuple[int, Slice]]]:
    """Maps each part's output to its slices in undamaged old shards, each with its first record."""
    known = {os.path.basename(task.output): (task.output, stats) for task, stats in parts}
    found: dict[str, list[tuple[int, Slice]]] = collections.defaultdict(list)
    for name in files.list_names(folder, STATS_SUFFIX):
        path = files.join(folder, name.removesuffix(STATS_SUFFIX))
        if kind_of(path) not in _COPIED_FORMATS:
            continue
        written = files.read_object(path + STATS_SUFFIX) or {}
        rows = written.get("input", {}).get("parts")
        if not rows or written["output"]["bytes"] != files.size(path):
            continue
        first = 0
        for name, start, stop, part_hash in rows:
            output, stats = known.get(name, ("", {}))
            # The part may have been rewritten since.
            if output and _hash_part(stats) == part_hash:
                found[output].append((start, Slice(path, first, first + stop - start)))
            first += stop - start
    return {output: sorted(slices) for output, slices in found.items()}


def name_prefix(config: ml_collections.ConfigDict) -> str:
    """Returns the common prefix of the names of all shards of a config, parts and output."""
    return shard_name(config.dataset_name, config.split, 0, 1, "").removesuffix("00000")


def find_foreign(folder: str, config: ml_collections.ConfigDict) -> list[str]:
    """Returns the names of shards in a folder that training would read but no filter wrote."""
    names = sources.read_shards(folder, config.output_format)
    if not names:
        return []
    present = set(files.list_names(folder))
    paths = [files.join(folder, name) for name in names]
    is_ours = dict(zip(names, files.map_many(_is_ours, paths, folder), strict=True))
    # A shard is also ours if a killed run left no statistics for it, or they are damaged.
    is_begun = SETTINGS in present or files.exists(files.join(folder, PARTS, SETTINGS))
    prefix = name_prefix(config)

    def is_left(name: str) -> bool:
        return is_begun and is_ours[name] is None and name.startswith(prefix)

    return [name for name in names if not (is_ours[name] or is_left(name))]


def _is_ours(path: str) -> bool | None:
    """Returns True if the statistics say that a filter wrote the shard; None if there are none."""
    stats = files.read_object(path + STATS_SUFFIX)
    if stats is None:
        return None
    is_part = SUFFIX in stats.get("output", {}).get("companions", {})
    return is_part or "parts" in stats.get("input", {})


def remove_stale_shards(folder: str, planned: Sequence[BalancedShard], output_format: str) -> None:
    """Removes output shards of an earlier plan, in any format, that are not in this plan."""
    wanted = {os.path.basename(shard.output) for shard in planned}
    read = set(sources.read_shards(folder, output_format))
    others = [name for name in files.list_names(folder) if kind_of(name) and name not in wanted]
    stale = [name for name in others if name in read or _is_ours(files.join(folder, name))]
    remove_outputs(folder, stale)


def remove_outputs(folder: str, names: Collection[str]) -> None:
    """Removes shards with all files that belong to them."""
    shards.remove_outputs(folder, names)
    for name in names:  # decisions about a table are in another folder
        files.remove(decisions_path(files.join(folder, name)))


def remove_records(folder: str, tasks: Sequence[shards.ShardTask]) -> None:
    """Removes the records of parts; their statistics stay."""
    wanted = {os.path.basename(task.output) + end for task in tasks for end in _OF_RECORDS}
    for name in files.list_names(folder, wanted=wanted.__contains__):
        files.remove(files.join(folder, name))
