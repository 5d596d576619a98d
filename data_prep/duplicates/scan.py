"""Scan of the input: the keys, content hashes, sizes and embeddings of its pairs, unit by unit.

A unit is a source shard, or a file of precomputed embeddings. It is named by a hash of its input's
path below its root, so that one that is added, removed or replaced costs itself. NAME.arrow has a
row for each pair; next to it are NAME.arrow.npy, float16 [n, d], and NAME.arrow.greys.npy, uint8
[n, 32, 32]. The statistics, with what the input was, are written last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import precomputed
from data_prep.duplicates.pictures import SIDE, describe_picture, shrink_picture
from data_prep.duplicates.rows import EMBEDDINGS, GREYS, hash_keys, write_columns
from data_prep.jobs import fingerprint, shards
from data_prep.jobs.crash_search import BATCH, PAIR, CrashSearch, WorkRecord
from data_prep.jobs.engine import Report
from data_prep.jobs.failures import allowed_number
from data_prep.jobs.manifest import Input, hash_inputs
from data_prep.jobs.shards import ShardTask
from data_prep.sources.list import find_root, list_inputs, read_pairs
from diht_jax.input.decode import MAX_PIXELS, ImageError, open_image
from diht_jax.readers.base import Skipped, SourceShard
from diht_jax.records.formats.tar_members import DamagedTarError
from diht_jax.records.schema import Pair
from diht_jax.storage import files

EMBEDDED = "embeddings"  # kind of a source that is a file of keys and vectors
FOLDER = "scan"

_ROWS = ".arrow"
_OURS = re.compile(rf"[0-9a-f]{{16}}{re.escape(_ROWS)}(\..+)?")
_SHOWN = 4
_BATCH = 256  # entries after which progress is reported, and among which a crash is searched for


@dataclasses.dataclass(frozen=True, slots=True)
class Unit(ShardTask):
    """A shard of pairs, or a file of embeddings, to scan.

    Attributes:
        embeddings: files with the embeddings of the shard's pairs.
    """

    embeddings: tuple[str, ...] = ()


def find_inputs(config: ml_collections.ConfigDict) -> Sequence[Input]:
    """The shards of `config.input`, or the files of embeddings where there is none.

    Raises:
        ValueError: there are none.
    """
    if config.input is not None:
        return list_inputs(config.input, config.source)
    pattern = config.embeddings.files
    paths = precomputed.find_files(pattern)
    if not paths:
        raise ValueError(
            f"config.embeddings.files='{pattern}': no such file; expected .npz or .parquet files"
        )
    return [Input(SourceShard(EMBEDDED, path), find_root(pattern)) for path in paths]


def plan_units(
    config: ml_collections.ConfigDict, inputs: Sequence[Input], folder: str
) -> list[Unit]:
    """The unit of every input.

    Args:
        config: of `duplicates.config.default_config`.
        inputs: of `find_inputs`.
        folder: of the output.

    Raises:
        ValueError: the precomputed embeddings are of other shards.
    """
    files_of: Sequence[tuple[str, ...]] = [()] * len(inputs)
    if config.input is not None and config.embeddings.kind == "files":
        files_of = _find_embeddings(config, [found.shard for found in inputs])
    return [
        Unit(
            found.shard,
            files.join(folder, FOLDER, name + _ROWS),
            shards.hash_config({"embeddings": [_identify(path) for path in embeddings]}),
            config.input_identity,
            embeddings=embeddings,
        )
        for found, name, embeddings in zip(inputs, hash_inputs(inputs), files_of, strict=True)
    ]


def _identify(path: str) -> dict[str, Any]:
    return SourceShard(EMBEDDED, path).identity()


def _find_embeddings(
    config: ml_collections.ConfigDict, sources: Sequence[SourceShard]
) -> list[tuple[str, ...]]:
    """The files of `diht_jax.embed` of each shard; it may have embedded more shards."""
    folder = config.embeddings.files
    try:
        listed = precomputed.list_shards(folder)
    except ValueError as error:
        raise ValueError(f"config.embeddings.files={error}") from error
    known = dict(zip(listed, precomputed.files_of_shards(folder, len(listed)), strict=True))
    identities = (source.identity() for source in sources)
    found = [known.get((identity["path"], identity["start"]), ()) for identity in identities]
    if not all(found):
        raise ValueError(
            f"config.embeddings.files='{folder}' is of another input than "
            f"config.input='{config.input}': it has no embeddings of {sources[found.index(())]}"
        )
    return found


def reject_or_remove_stale(
    units: Sequence[Unit], folder: str, max_changed: float
) -> dict[str, dict[str, Any]]:
    """Removes scans of inputs that are gone or were replaced, while they are few.

    Args:
        units: of all inputs.
        folder: of the output.
        max_changed: `config.max_changed_shards`.

    Returns:
        Output of each unit that is scanned -> what is held of its statistics.

    Raises:
        ValueError: they are more than `max_changed` allows.
    """
    fingerprint.forget_linked()  # as an earlier run of this process saw them
    where = files.join(folder, FOLDER)
    present = files.list_names(where, lambda name: _OURS.fullmatch(name) is not None)
    ending = shards.STATS_SUFFIX
    scanned = {name.removesuffix(ending) for name in present if name.endswith(ending)}
    own = {os.path.basename(unit.output) for unit in units}
    gone = sorted(scanned - own)
    done, changed = {}, []
    there = [unit for unit in units if os.path.basename(unit.output) in scanned]
    for unit, stats, change in shards.check_all(there):
        if stats is not None and change is None:
            done[unit.output] = unit, shards.trim_stats(stats)
        elif stats is not None:
            changed.append(unit)
    allowed = allowed_number(max_changed, len(scanned))
    if len(gone) + len(changed) > allowed:
        raise ValueError(_describe_changes(where, gone, changed, max_changed, allowed))
    for unit in changed:
        logging.warning("%s: scanned again, since it or its embeddings changed", unit.source)
    for path in shards.damaged_outputs(list(done.values())):
        changed.append(done.pop(path)[0])
    for unit in changed:
        files.remove(unit.stats_path)
    # The statistics first: without them a unit is not scanned.
    stale = set(present) - set(shards.names_below(present, own))
    for name in sorted(stale, key=lambda name: not name.endswith(ending)):
        files.remove(files.join(where, name))
    if gone:
        logging.warning("%s: %d scans of inputs that are gone are removed", where, len(gone))
    return {path: stats for path, (_, stats) in done.items()}


def _describe_changes(
    folder: str, gone: Sequence[str], changed: Sequence[Unit], max_changed: float, allowed: int
) -> str:
    paths = [
        files.read_object(files.join(folder, name + fingerprint.LOCATION_SUFFIX))
        for name in gone[:_SHOWN]
    ]
    names = [found["path"] for found in paths if found] + [str(unit.source) for unit in changed]
    count = len(gone) + len(changed)
    return (
        f"'{folder}' holds {len(gone)} scans of inputs that config.input or "
        f"config.embeddings.files no longer names, and {len(changed)} of inputs that were "
        f"replaced, such as {', '.join(names[:_SHOWN])}; config.max_changed_shards="
        f"{max_changed:g} allows {allowed} together. Choose another config.output, or have them "
        f"removed or scanned again with --config.max_changed_shards={count}"
    )


def list_scans(parts: Sequence[tuple[ShardTask, Mapping[str, Any]]]) -> list[list[str]]:
    """Name and hash of the scan of each unit, in order: what the search is made of."""
    return [[os.path.basename(unit.output), stats["output"]["digest"]] for unit, stats in parts]


def scan_unit(unit: Unit, report: Report, *, config: ml_collections.ConfigDict) -> None:
    """Writes the outputs of a unit.

    Args:
        unit: what to scan.
        report: called with the number of pairs that are done, now and then.
        config: of `duplicates.config.default_config`.

    Raises:
        ValueError: the input is damaged, or no file of embeddings.
    """
    if unit.search is not None:  # workers have died of it, and left half-written files
        folder, name = os.path.split(unit.output)
        shards.remove_temporary_files(folder, [name])
    files.remove(unit.stats_path)
    described = fingerprint.describe(unit.source, unit.identity)
    with WorkRecord(unit.output, unit.search) as work:
        if unit.source.kind == EMBEDDED:
            keys, found = precomputed.read_embeddings(unit.source.path)
            report(len(keys))
            nothing = np.zeros((len(keys), 2), np.uint64)
            columns = keys, nothing, np.zeros(len(keys), np.int64), found, None
        else:
            columns = _scan_pairs(unit, report, work, config)
        digest = _write(unit.output, *columns)
        companions = (EMBEDDINGS,) if columns[-1] is None else (EMBEDDINGS, GREYS)
        shards.finish_task(unit, described, {}, len(columns[0]), companions, digest)


def _scan_pairs(
    unit: Unit, report: Report, work: WorkRecord, config: ml_collections.ConfigDict
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """Keys, halves of the content hashes, pixels, embeddings and greys of the pairs of a shard."""
    known: dict[str, np.ndarray] = {}
    for path in unit.embeddings:
        known |= dict(zip(*precomputed.read_embeddings(path), strict=True))
    keys, digests, pixels, rows, greys = [], [], [], [], []
    for entry, is_deadly in _entries(unit, report, work, config):
        if isinstance(entry, Pair):
            keys.append(entry.key)
            digests.append(hashlib.blake2b(entry.image, digest_size=16).digest())
            looks = (0, None, None) if is_deadly else _look_at(entry, known, config)
            for column, value in zip((pixels, rows, greys), looks, strict=True):
                column.append(value)
    width = max((len(row) for row in rows if row is not None), default=0)
    embeddings = np.zeros((len(keys), width), np.float16)
    for number, row in enumerate(rows):
        if row is not None:
            embeddings[number] = row
    hashes = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    return keys, hashes, np.asarray(pixels, np.int64), embeddings, greys


def _entries(
    unit: Unit, report: Report, work: WorkRecord, config: ml_collections.ConfigDict
) -> Iterator[tuple[Pair | Skipped, bool]]:
    """The entries of a shard, and of each whether its picture has ended the worker before.

    Once a worker has died it is recorded what this one works on: the batch, and in the batch of the
    last death each entry, while it is looked at.
    """
    search, number = unit.search or CrashSearch(), 0
    entries = read_pairs(unit.source)
    try:
        while True:
            first = number - number % _BATCH
            batch = first, first + _BATCH
            is_suspect = search.suspects == batch
            if number == first or is_suspect:
                work.write(BATCH, *batch)
            entry = next(entries, None)
            if entry is None:
                break
            if is_suspect:
                work.write(PAIR, number, number + 1)
            yield entry, number in search.crashed
            number += 1
            if number % _BATCH == 0:
                report(_BATCH)
    except DamagedTarError as error:
        if not config.keep_before_damage:
            raise
        logging.warning("%s; the pairs before the damage are compared", error)
    report(number % _BATCH)


def _look_at(
    pair: Pair, known: Mapping[str, np.ndarray], config: ml_collections.ConfigDict
) -> tuple[int, np.ndarray | None, np.ndarray | None]:
    """Pixels of the picture, embedding and greys; 0 and None where there is none."""
    greys = None
    try:
        if config.embeddings.kind == "descriptor":
            row, greys, (width, height) = describe_picture(
                pair.image, mirrored=config.embeddings.mirrored, max_pixels=MAX_PIXELS
            )
            return width * height, row, greys
        if config.verify.correlation is not None:
            greys, (width, height) = shrink_picture(pair.image, max_pixels=MAX_PIXELS)
        else:
            width, height = open_image(pair.image).size
        return width * height, known.get(pair.key), greys
    except ImageError:
        return 0, None, None


def _write(
    path: str,
    keys: Sequence[str],
    hashes: np.ndarray,
    pixels: np.ndarray,
    embeddings: np.ndarray,
    greys: Sequence[np.ndarray | None] | None,
) -> str:
    """Writes the files of a unit; returns a hash of all they hold."""
    import pyarrow

    embeddings = embeddings.astype(np.float16)
    hashed = [hashes, pixels, embeddings]
    _save(path + EMBEDDINGS, embeddings)
    if greys is not None:
        flat = np.zeros((SIDE, SIDE), np.uint8)
        rows = np.array([flat if row is None else row for row in greys], np.uint8)
        hashed.append(rows.reshape(-1, *flat.shape))
        _save(path + GREYS, hashed[-1])
    columns = {
        "key": pyarrow.array(keys, pyarrow.large_string()),
        "hash": hash_keys(keys),
        "high": np.ascontiguousarray(hashes[:, 0]),
        "low": np.ascontiguousarray(hashes[:, 1]),
        "pixels": pixels,
    }
    write_columns(path, columns)
    digest = hashlib.blake2b(json.dumps(list(keys)).encode(), digest_size=16)
    for array in hashed:
        digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def _save(path: str, array: np.ndarray) -> None:
    with files.local_output(path) as local, open(local, "wb") as file:
        np.save(file, array)
