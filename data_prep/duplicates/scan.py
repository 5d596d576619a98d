"""Scan of the input: keys, content hashes, sizes and embeddings of all pairs, unit by unit.

Each unit has an Arrow file with the columns of `rows.py`, named by `hash_inputs`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import precomputed
from data_prep.duplicates.pictures import describe_picture
from data_prep.duplicates.rows import CAPTION, EMBEDDING, THUMBNAIL, hash_texts, write_columns
from data_prep.jobs import shards
from data_prep.jobs.engine import CRASHED, Report, WorkRecord
from data_prep.jobs.failures import allowed_number, find_finished
from data_prep.jobs.shards import ShardTask
from data_prep.sources import Input, find_root, hash_inputs, list_inputs, read_pairs
from diht_jax.input.transforms import MAX_PIXELS, ImageError, open_image
from diht_jax.readers.base import Skipped, SourceShard
from diht_jax.records.schema import Pair
from diht_jax.records.tars import DamagedTarError
from diht_jax.storage import files

EMBEDDED = "embeddings"  # kind of a source that is a file of keys and vectors
FOLDER = "scan"

_ROWS = ".arrow"
_OURS = re.compile(rf"([0-9a-f]{{16}}{re.escape(_ROWS)})(\..+)?")
_SHOWN = 4
_BATCH = 256  # entries per progress report, and per batch of the search for crashes

# Content hash, captions, number of pixels (0 if unreadable), embedding and thumbnail.
_Seen = tuple[bytes, str, int, np.ndarray | None, np.ndarray | None]
_NOT_SEEN: _Seen = (bytes(16), "", 0, None, None)


@dataclasses.dataclass(frozen=True, slots=True)
class Unit(ShardTask):
    """A shard of pairs or a file of embeddings to scan.

    Attributes:
        embeddings: files with the embeddings of the shard's pairs.
    """

    embeddings: tuple[str, ...] = ()


def find_inputs(config: ml_collections.ConfigDict) -> Sequence[Input]:
    """Finds the shards of `config.input`, or the files of embeddings if no input is set.

    Raises:
        ValueError: nothing was found.
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
    """Returns the unit of every input.

    Raises:
        ValueError: the precomputed embeddings belong to other shards.
    """
    embeddings: list[list[str]] = [[] for _ in inputs]
    if config.input is not None and config.embeddings.kind == "files":
        where = config.embeddings.files
        try:
            known = precomputed.find_shard_files(where)
        except ValueError as error:
            raise ValueError(f"config.embeddings.files={error}") from error
        embeddings = [precomputed.files_of_shard(known, found.shard) for found in inputs]
        if not all(embeddings):
            raise ValueError(
                f"config.embeddings.files='{where}' is of another input than config.input="
                f"'{config.input}': it has no embeddings of {inputs[embeddings.index([])].shard}"
            )
    return [
        Unit(
            found.shard,
            files.join(folder, FOLDER, name + _ROWS),
            shards.hash_config(
                {"embeddings": [SourceShard(EMBEDDED, path).identity() for path in paths]}
            ),
            config.input_identity,
            embeddings=tuple(paths),
        )
        for found, name, paths in zip(inputs, hash_inputs(inputs), embeddings, strict=True)
    ]


def reject_or_remove_stale(
    units: Sequence[Unit], folder: str, max_changed: float
) -> dict[str, dict[str, Any]]:
    """Removes scans of missing or replaced inputs, if they are few (`max_changed`).

    Returns:
        Output of each scanned unit -> statistics kept in memory.

    Raises:
        ValueError: more inputs have changed than `max_changed` allows.
    """
    where, ending = files.join(folder, FOLDER), shards.STATS_SUFFIX
    present = files.list_names(where, wanted=_OURS.fullmatch)
    scanned = {name.removesuffix(ending) for name in present if name.endswith(ending)}
    own = {os.path.basename(unit.output) for unit in units}
    there = [unit for unit in units if os.path.basename(unit.output) in scanned]
    done, gone = find_finished(there), sorted(scanned - own)
    # Damaged scans of unchanged inputs are not counted, and are always repeated.
    again = [unit for unit in there if unit.output not in done]
    changed = [
        unit
        for unit, stats, change in shards.check_all(again)
        if stats is not None and change is not None
    ]
    count, allowed = len(gone) + len(changed), allowed_number(max_changed, len(scanned))
    if count > allowed:
        located = (
            files.read_object(files.join(where, name + shards.LOCATION_SUFFIX))
            for name in gone[:_SHOWN]
        )
        names = [found["path"] for found in located if found] + [str(u.source) for u in changed]
        raise ValueError(
            f"'{where}' holds {len(gone)} scans of inputs that config.input or "
            f"config.embeddings.files no longer names, and {len(changed)} of inputs that were "
            f"replaced, such as {', '.join(names[:_SHOWN])}; config.max_changed_shards="
            f"{max_changed:g} allows {allowed} together. Choose another config.output, or have "
            f"them removed or scanned again with --config.max_changed_shards={count}"
        )
    for unit in again:
        logging.warning(
            "%s: scanned again, since it, its embeddings or its scan changed", unit.source
        )
        files.remove(unit.stats_path)
    shards.remove_outputs(where, {_OURS.sub(r"\1", name) for name in present} - own)
    if gone:
        logging.warning("%s: %d scans of inputs that are gone are removed", where, len(gone))
    return done


def scan_unit(unit: Unit, report: Report, *, config: ml_collections.ConfigDict) -> None:
    """Scans a unit, and writes its rows.

    Raises:
        ValueError: the input is damaged, or is not a file of embeddings.
    """
    import pyarrow

    described = shards.begin_task(unit)
    with WorkRecord(unit.output, unit.search) as work:
        if unit.source.kind == EMBEDDED:
            keys, found = precomputed.read_embeddings(unit.source.path)
            report(len(keys))
            columns = {
                "content": np.zeros((len(keys), 2), np.uint64),
                CAPTION: np.zeros(len(keys), np.uint64),
                "pixels": np.zeros(len(keys), np.int64),
                EMBEDDING: _to_half(found),
            }
        else:
            keys, columns = _scan_pairs(unit, report, work, config)
        named = {"key": pyarrow.array(keys, pyarrow.large_string()), "hash": hash_texts(keys)}
        digest = write_columns(unit.output, named | columns)
        shards.finish_task(unit, described, {}, len(keys), digest=digest)


def _scan_pairs(
    unit: Unit, report: Report, work: WorkRecord, config: ml_collections.ConfigDict
) -> tuple[list[str], dict[str, np.ndarray]]:
    """Scans the pairs of a shard; returns their keys, and the other columns."""
    known = precomputed.read_all(unit.embeddings)
    look = functools.partial(_look_at, known=known, config=config)
    keys, seen, entries = [], [], _read_pairs(unit, config)
    while batch := list(itertools.islice(entries, _BATCH)):
        for entry in work.begin(batch, look):
            if isinstance(entry, Pair) or entry.reason == CRASHED:
                keys.append(entry.key)
                seen.append(look(entry) if isinstance(entry, Pair) else _NOT_SEEN)
        report(len(batch))
    parts = zip(*seen, strict=True) if seen else [()] * 5
    digests, captions, pixels, embeddings, thumbnails = parts
    stacked = _stack(embeddings, np.float32)
    columns = {
        CAPTION: hash_texts(captions),
        "content": np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2),
        "pixels": np.array(pixels, np.int64),
        EMBEDDING: None if stacked is None else _to_half(stacked),
        THUMBNAIL: _stack(thumbnails, np.uint8),
    }
    return keys, {name: column for name, column in columns.items() if column is not None}


def _stack(rows: Sequence[np.ndarray | None], dtype: Any) -> np.ndarray | None:
    """Stacks rows to [n, width], with zeros for missing rows; None if all are missing."""
    width = next((row.size for row in rows if row is not None), None)
    if width is None:
        return None
    found = np.zeros((len(rows), width), dtype)
    for number, row in enumerate(rows):
        if row is not None:
            found[number] = row.ravel()
    return found


def _to_half(embeddings: np.ndarray) -> np.ndarray:
    """Converts to float16 [n, d]; scales rows that are out of its range, which keeps cosines."""
    most = np.abs(embeddings).max(axis=1, keepdims=True)
    is_scaled = (most > 2**15) | ((most < 2**-8) & (most > 0))
    return (embeddings / np.where(is_scaled, most, 1)).astype(np.float16)


def _read_pairs(unit: Unit, config: ml_collections.ConfigDict) -> Iterator[Pair | Skipped]:
    try:
        yield from read_pairs(unit.source)
    except DamagedTarError as error:
        if not config.keep_before_damage:
            raise
        logging.warning("%s; the pairs before the damage are compared", error)


def _look_at(
    pair: Pair, known: Mapping[str, np.ndarray], config: ml_collections.ConfigDict
) -> _Seen:
    embedding, thumbnail = known.get(pair.key), None
    digest = hashlib.blake2b(pair.image, digest_size=16).digest()
    texts = pair.metadata.get("captions") or [pair.caption]
    caption = "\n".join(" ".join(text.split()) for text in texts)
    try:
        if config.embeddings.kind != "descriptor" and config.verify.correlation is None:
            width, height = open_image(pair.image).size
        else:
            descriptor, thumbnail, (width, height) = describe_picture(
                pair.image, mirrored=config.embeddings.mirrored, max_pixels=MAX_PIXELS
            )
            embedding = descriptor if config.embeddings.kind == "descriptor" else embedding
        return digest, caption, width * height, embedding, thumbnail
    except ImageError:
        return digest, caption, 0, None, None
