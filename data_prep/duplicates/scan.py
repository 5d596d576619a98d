"""One unit of the input: the keys, content hashes, sizes and embeddings of its pairs, to files.

A unit is a source shard, or a file of given embeddings. Beside STEM.npy, float16 [n, d], lies
STEM.arrow with a row for each pair: it is written last, and the unit is done with it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.duplicates.descriptor import describe_picture
from data_prep.duplicates.table import hash_keys
from data_prep.jobs.engine import Report
from data_prep.sources.list import read_pairs
from diht_jax.data.atomic_file import open_atomically
from diht_jax.data.images.decode import MAX_PIXELS, ImageError, open_image
from diht_jax.data.readers.base import SourceShard
from diht_jax.data.records.schema import Pair

EMBEDDINGS, ROWS = ".npy", ".arrow"

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

    def is_done(self) -> bool:
        """Whether the outputs are there."""
        return os.path.exists(self.stem + ROWS)


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
        _write(unit.stem, keys, nothing, np.zeros(len(keys), np.int64), found)
        return
    given: dict[str, np.ndarray] = {}
    for path in unit.embeddings:
        keys, found = read_embeddings(path)
        given |= dict(zip(keys, found, strict=True))
    keys, digests, pixels, rows = [], [], [], []
    for entry in read_pairs(unit.source):
        if isinstance(entry, Pair):
            keys.append(entry.key)
            digests.append(hashlib.blake2b(entry.image, digest_size=16).digest())
            count, row = _look_at(entry, given, config)
            pixels.append(count)
            rows.append(row)
        if len(keys) % _REPORTED == 0:
            report(_REPORTED if keys else 0)
    report(len(keys) % _REPORTED)
    width = max((len(row) for row in rows if row is not None), default=0)
    embeddings = np.zeros((len(keys), width), np.float16)
    for number, row in enumerate(rows):
        if row is not None:
            embeddings[number] = row
    hashes = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
    _write(unit.stem, keys, hashes, np.asarray(pixels, np.int64), embeddings)


def read_embeddings(path: str) -> tuple[list[str], np.ndarray]:
    """The keys and image embeddings of a file of `diht_jax.embed`, or of the same form.

    Args:
        path: .npz with "key" and "image_emb", or .parquet with such columns.

    Returns:
        n keys, and float32 [n, d].

    Raises:
        ValueError: it holds something else.
    """
    try:
        if path.endswith(".parquet"):
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(path, columns=["key", "image_emb"])
            keys = table["key"].to_pylist()
            values = table["image_emb"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            found = values.reshape(len(keys), -1)
        else:
            with np.load(path, allow_pickle=False) as file:
                keys, found = file["key"].tolist(), file["image_emb"]
        if found.ndim != 2 or len(keys) != len(found) or not np.isfinite(found).all():
            raise ValueError(f"{len(keys)} keys and embeddings {found.shape}, all finite")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected 'key' and 'image_emb' [n, d] as diht_jax.embed writes them "
            f"({type(error).__name__}: {error})"
        ) from error
    return [str(key) for key in keys], np.asarray(found, np.float32)


def _look_at(
    pair: Pair, given: dict[str, np.ndarray], config: ml_collections.ConfigDict
) -> tuple[int, np.ndarray | None]:
    """Pixels of the picture, and its embedding; 0 and None where there is none."""
    try:
        if config.embeddings.kind == "descriptor":
            row, (width, height) = describe_picture(
                pair.image, mirrored=config.embeddings.mirrored, max_pixels=MAX_PIXELS
            )
            return width * height, row
        width, height = open_image(pair.image).size
        return width * height, given.get(pair.key)
    except ImageError:
        return 0, None


def _write(
    stem: str,
    keys: Sequence[str],
    hashes: np.ndarray,
    pixels: np.ndarray,
    embeddings: np.ndarray,
) -> None:
    import pyarrow

    with open_atomically(pathlib.Path(stem + EMBEDDINGS)) as file:
        np.save(file, embeddings.astype(np.float16))
    batch = pyarrow.record_batch(
        {
            "key": pyarrow.array(keys, pyarrow.large_string()),
            "hash": pyarrow.array(hash_keys(keys)),
            "high": pyarrow.array(np.ascontiguousarray(hashes[:, 0])),
            "low": pyarrow.array(np.ascontiguousarray(hashes[:, 1])),
            "pixels": pyarrow.array(pixels),
        }
    )
    with (
        open_atomically(pathlib.Path(stem + ROWS)) as file,
        pyarrow.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)


class Rows:
    """The rows of all units, numbered in their order; what is read lies in mapped files.

    Attributes:
        units: that were scanned.
        starts: int64 [units + 1], the number of each unit's first row.
    """

    def __init__(self, units: Sequence[Unit]):
        self.units = list(units)
        self._open = functools.lru_cache(maxsize=_OPEN_UNITS)(_open_unit)
        counts = [self._open(unit.stem)[0].num_rows for unit in self.units]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, of all rows."""
        return np.concatenate([self.unit_column(i, name) for i in range(len(self.units))])

    def take(self, name: str, rows: np.ndarray) -> np.ndarray:
        """A column of numbers, of some rows."""
        found = np.empty(len(rows), self.unit_column(0, name).dtype)
        for unit, positions, local in self._by_unit(rows):
            found[positions] = self.unit_column(unit, name)[local]
        return found

    def unit_column(self, number: int, name: str) -> np.ndarray:
        """A column of numbers, of the rows of a unit."""
        return self._open(self.units[number].stem)[0].column(name).to_numpy()

    def unit_keys(self, number: int) -> list[str]:
        """The keys of a unit."""
        return self._open(self.units[number].stem)[0].column("key").to_pylist()

    def unit_has_embedding(self, number: int) -> np.ndarray:
        """bool [n]: whose embedding is not missing, and has a direction."""
        return np.any(self._open(self.units[number].stem)[1] != 0, axis=1)

    def keys(self, rows: np.ndarray) -> Any:
        """The keys of rows, as a pyarrow array."""
        import pyarrow

        parts = [pyarrow.array([], pyarrow.large_string())]
        numbers = [np.empty(0, np.int64)]
        for unit, positions, local in self._by_unit(rows):
            column = self._open(self.units[unit].stem)[0].column("key")
            parts.append(column.take(pyarrow.array(local)))
            numbers.append(positions)
        order = np.argsort(np.concatenate(numbers))
        return pyarrow.concat_arrays(parts).take(pyarrow.array(order))

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, d] of rows, each of length 1.

        Raises:
            ValueError: units have embeddings of another size.
        """
        width = self.width()
        found = np.empty((len(rows), width), np.float32)
        for unit, positions, local in self._by_unit(rows):
            found[positions] = self._open(self.units[unit].stem)[1][local]
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    @functools.cached_property
    def _widths(self) -> set[int]:
        units = [i for i in range(len(self.units)) if self.starts[i + 1] > self.starts[i]]
        return {self._open(self.units[i].stem)[1].shape[1] for i in units} - {0}

    def width(self) -> int:
        """The size of the embeddings; 0 where there are none.

        Raises:
            ValueError: there are several.
        """
        if len(self._widths) > 1:
            raise ValueError(f"embeddings of several sizes: {sorted(self._widths)}")
        return max(self._widths, default=0)

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


def _open_unit(stem: str) -> tuple[Any, np.ndarray]:
    import pyarrow

    batch = pyarrow.ipc.open_file(pyarrow.memory_map(stem + ROWS)).get_batch(0)
    return batch, np.load(stem + EMBEDDINGS, mmap_mode="r")
