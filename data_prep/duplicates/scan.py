"""One unit of the input: the keys, content hashes, sizes and embeddings of its pairs, to files.

A unit is a source shard, or a file of given embeddings. NAME.arrow has a row for each pair. Beside
it lie NAME.arrow.npy, float16 [n, d], and NAME.arrow.greys.npy, uint8 [n, 32, 32]; the statistics,
with what the input was, are written last, and the unit is done with them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import aligned, mapped
from data_prep.duplicates.descriptor import describe_picture, shrink_picture
from data_prep.duplicates.given import read_embeddings
from data_prep.duplicates.table import hash_keys
from data_prep.duplicates.units import EMBEDDED, Unit
from data_prep.jobs import fingerprint, shards
from data_prep.jobs.crash_search import BATCH, PAIR, CrashSearch, WorkRecord
from data_prep.jobs.engine import Report
from data_prep.sources.list import read_pairs
from diht_jax.input.decode import MAX_PIXELS, ImageError, open_image
from diht_jax.readers.base import Skipped
from diht_jax.records.formats.tar_members import DamagedTarError
from diht_jax.records.schema import Pair
from diht_jax.storage import files

EMBEDDINGS, GREYS = ".npy", ".greys.npy"  # behind the name of the file with the rows

_BATCH = 256  # entries after which progress is reported, and among which a crash is searched for
_OPEN_UNITS = 512


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
            keys, found = read_embeddings(unit.source.path)
            report(len(keys))
            nothing = np.zeros((len(keys), 2), np.uint64)
            columns = keys, nothing, np.zeros(len(keys), np.int64), found, None
        else:
            columns = _scan_pairs(unit, report, work, config)
        digest = _write(unit.output, *columns)
        beside = (EMBEDDINGS,) if columns[-1] is None else (EMBEDDINGS, GREYS)
        shards.finish_task(unit, described, {}, len(columns[0]), beside, digest)


def _scan_pairs(
    unit: Unit, report: Report, work: WorkRecord, config: ml_collections.ConfigDict
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray, list[np.ndarray | None]]:
    """Keys, halves of the content hashes, pixels, embeddings and greys of the pairs of a shard."""
    given: dict[str, np.ndarray] = {}
    for path in unit.embeddings:
        names, found = read_embeddings(path)
        given |= dict(zip(names, found, strict=True))
    keys, digests, pixels, rows, greys = [], [], [], [], []
    for entry, is_deadly in _entries(unit, report, work, config):
        if isinstance(entry, Pair):
            keys.append(entry.key)
            digests.append(hashlib.blake2b(entry.image, digest_size=16).digest())
            looks = (0, None, None) if is_deadly else _look_at(entry, given, config)
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
    pair: Pair, given: dict[str, np.ndarray], config: ml_collections.ConfigDict
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
        return width * height, given.get(pair.key), greys
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
    """Writes the rows and what lies beside them; returns a hash of all."""
    import pyarrow

    embeddings = embeddings.astype(np.float16)
    hashed = [hashes, pixels, embeddings]
    _save(path + EMBEDDINGS, embeddings)
    if greys is not None:
        flat = np.zeros((aligned.SIDE, aligned.SIDE), np.uint8)
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
    mapped.write_columns(path, columns)
    digest = hashlib.blake2b(json.dumps(list(keys)).encode(), digest_size=16)
    for array in hashed:
        digest.update(repr(array.shape).encode() + array.tobytes())
    return digest.hexdigest()


def _save(path: str, array: np.ndarray) -> None:
    with files.local_output(path) as local, open(local, "wb") as file:
        np.save(file, array)


class Rows:
    """The rows of all units, numbered in their order; what is read lies in mapped files.

    Attributes:
        units: that were scanned.
        starts: int64 [units + 1], the number of each unit's first row.
    """

    def __init__(self, units: Sequence[Unit], cache: str, starts: np.ndarray):
        """Opens what was scanned.

        Args:
            units: that were scanned.
            cache: the folder of `mapped.fetch`.
            starts: see above.
        """
        self.units = list(units)
        self._cache = cache
        self._width: int | None = None
        keep = functools.lru_cache(maxsize=_OPEN_UNITS)
        self._table = keep(lambda unit: mapped.open_batch(self.units[unit].output, cache))
        self._matrix = keep(lambda unit: self._map(unit, EMBEDDINGS))
        self.starts = starts

    def __len__(self) -> int:
        return int(self.starts[-1])

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of numbers, of some rows."""
        found = np.empty(len(rows), self.unit_column(0, name).dtype)
        for unit, positions, local in self._by_unit(rows):
            found[positions] = self.unit_column(unit, name)[local]
        return found

    def unit_column(self, number: int, name: str) -> np.ndarray:
        """A column of numbers, of the rows of a unit."""
        return self._table(number).column(name).to_numpy()

    def unit_keys(self, number: int) -> list[str]:
        """The keys of a unit."""
        return self._table(number).column("key").to_pylist()

    def unit_has_embedding(self, number: int) -> np.ndarray:
        """bool [n]: whose embedding is not missing, and has a direction."""
        return np.any(self._matrix(number) != 0, axis=1)

    def keys(self, rows: np.ndarray) -> Any:
        """The keys of rows, as a pyarrow array."""
        import pyarrow

        parts = [pyarrow.array([], pyarrow.large_string())]
        numbers = [np.empty(0, np.int64)]
        for unit, positions, local in self._by_unit(rows):
            column = self._table(unit).column("key")
            parts.append(column.take(pyarrow.array(local)))
            numbers.append(positions)
        order = np.argsort(np.concatenate(numbers))
        return pyarrow.concat_arrays(parts).take(pyarrow.array(order))

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, d] of rows, each of length 1.

        Raises:
            ValueError: units have embeddings of another size.
        """
        parts = self._by_unit(rows)
        if self._width is None and parts:
            self._width = self._matrix(parts[0][0]).shape[1]
        found = np.empty((len(rows), self._width or 0), np.float32)
        for unit, positions, local in parts:
            matrix = self._matrix(unit)
            if matrix.shape[1] != self._width:
                raise ValueError(
                    f"embeddings of several sizes: {matrix.shape[1]} of '{self.units[unit].source}'"
                    f", {self._width} of others; expected those of one model"
                )
            found[positions] = matrix[local]
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        return found

    def greys(self, rows: np.ndarray) -> np.ndarray:
        """uint8 [n, side, side], the thumbnails of rows."""
        found = np.empty((len(rows), aligned.SIDE, aligned.SIDE), np.uint8)
        for unit, positions, local in self._by_unit(rows):
            found[positions] = self._map(unit, GREYS)[local]
        return found

    def _map(self, unit: int, ending: str) -> np.ndarray:
        path = mapped.fetch(self.units[unit].output + ending, self._cache)
        return np.load(path, mmap_mode="r")

    def _by_unit(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Unit, positions in `rows`, and numbers within the unit."""
        if not len(rows):
            return []
        units = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(units, kind="stable")
        found, first = np.unique(units[order], return_index=True)
        groups = np.split(order, first[1:])
        return [
            (int(unit), positions, rows[positions] - self.starts[unit])
            for unit, positions in zip(found, groups, strict=True)
        ]
