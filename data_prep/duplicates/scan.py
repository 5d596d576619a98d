"""One unit of the input: the keys, content hashes, sizes and embeddings of its pairs, to files.

A unit is a source shard, or a file of given embeddings. Beside STEM.npy, float16 [n, d], and
STEM.greys.npy, uint8 [n, 32, 32], lies STEM.arrow with a row for each pair: it is written last, and
the unit is done with it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.duplicates import aligned, mapped
from data_prep.duplicates.descriptor import describe_picture, shrink_picture
from data_prep.duplicates.given import read_embeddings
from data_prep.duplicates.table import hash_keys
from data_prep.jobs import files
from data_prep.jobs.engine import Report
from data_prep.sources.list import read_pairs
from diht_jax.data.images.decode import MAX_PIXELS, ImageError, open_image
from diht_jax.data.readers.base import SourceShard
from diht_jax.data.records.schema import Pair

EMBEDDINGS, GREYS, ROWS = ".npy", ".greys.npy", ".arrow"

_REPORTED = 256
_OPEN_UNITS = 512


@dataclasses.dataclass(frozen=True)
class Unit:
    """What is scanned.

    Attributes:
        source: a shard of pairs, or the path of a file of embeddings.
        stem: path of the outputs without their endings.
        embeddings: files with the embeddings of the shard's pairs.
    """

    source: SourceShard | str
    stem: str
    embeddings: tuple[str, ...] = ()


def scan_unit(unit: Unit, report: Report, *, config: ml_collections.ConfigDict) -> None:
    """Writes the outputs of a unit.

    Args:
        unit: what to scan.
        report: called with the number of pairs that are done, now and then.
        config: of `duplicates.config.default_config`.

    Raises:
        ValueError: the input is damaged, or no file of embeddings.
    """
    if isinstance(unit.source, str):
        keys, found = read_embeddings(unit.source)
        report(len(keys))
        nothing = np.zeros((len(keys), 2), np.uint64)
        _write(unit.stem, keys, nothing, np.zeros(len(keys), np.int64), found, None)
        return
    given: dict[str, np.ndarray] = {}
    for path in unit.embeddings:
        keys, found = read_embeddings(path)
        given |= dict(zip(keys, found, strict=True))
    keys, digests, pixels, rows, greys = [], [], [], [], []
    for entry in read_pairs(unit.source):
        if isinstance(entry, Pair):
            keys.append(entry.key)
            digests.append(hashlib.blake2b(entry.image, digest_size=16).digest())
            count, row, thumbnail = _look_at(entry, given, config)
            pixels.append(count)
            rows.append(row)
            greys.append(thumbnail)
        if len(keys) % _REPORTED == 0:
            report(_REPORTED if keys else 0)
    report(len(keys) % _REPORTED)
    width = max((len(row) for row in rows if row is not None), default=0)
    embeddings = np.zeros((len(keys), width), np.float16)
    for number, row in enumerate(rows):
        if row is not None:
            embeddings[number] = row
    hashes = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    _write(unit.stem, keys, hashes, np.asarray(pixels, np.int64), embeddings, greys)


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
    stem: str,
    keys: Sequence[str],
    hashes: np.ndarray,
    pixels: np.ndarray,
    embeddings: np.ndarray,
    greys: Sequence[np.ndarray | None] | None,
) -> None:
    import pyarrow

    _save(stem + EMBEDDINGS, embeddings.astype(np.float16))
    if greys is not None:
        flat = np.zeros((aligned.SIDE, aligned.SIDE), np.uint8)
        rows = [flat if row is None else row for row in greys]
        _save(stem + GREYS, np.array(rows, np.uint8).reshape(-1, *flat.shape))
    columns = {
        "key": pyarrow.array(keys, pyarrow.large_string()),
        "hash": hash_keys(keys),
        "high": np.ascontiguousarray(hashes[:, 0]),
        "low": np.ascontiguousarray(hashes[:, 1]),
        "pixels": pixels,
    }
    mapped.write_columns(stem + ROWS, columns)


def _save(path: str, array: np.ndarray) -> None:
    with files.local_output(path) as local, open(local, "wb") as file:
        np.save(file, array)


class Rows:
    """The rows of all units, numbered in their order; what is read lies in mapped files.

    Attributes:
        units: that were scanned.
        starts: int64 [units + 1], the number of each unit's first row.
    """

    def __init__(self, units: Sequence[Unit], cache: str, starts: np.ndarray | None = None):
        """Opens what was scanned.

        Args:
            units: that were scanned.
            cache: the folder of `mapped.fetch`.
            starts: where they are known; else all units are looked at.
        """
        self.units = list(units)
        self._cache = cache
        self._width: int | None = None
        keep = functools.lru_cache(maxsize=_OPEN_UNITS)
        self._table = keep(lambda unit: mapped.open_batch(self.units[unit].stem + ROWS, cache))
        self._matrix = keep(lambda unit: self._map(unit, EMBEDDINGS))
        if starts is None:
            counts = [self._table(unit).num_rows for unit in range(len(self.units))]
            starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
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
        path = mapped.fetch(self.units[unit].stem + ending, self._cache)
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
