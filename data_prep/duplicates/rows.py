"""Rows of all scanned units, numbered in their order; what is read of them is in mapped files.

Files in a store are fetched once by a machine, into a folder below the system's temporary one; all
processes of the job share it.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.duplicates.pictures import SIDE
from diht_jax.storage import files
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.stores import input_version, is_remote

EMBEDDINGS, GREYS = ".npy", ".greys.npy"  # behind the name of the file with the columns

_OPEN_UNITS = 512


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """Hashes of keys, uint64 [n]."""
    texts = (key.encode("utf-8", "surrogatepass") for key in keys)
    data = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(data, "<u8")


def cache_folder(output: str) -> str:
    """Folder of this machine for the files of an output folder in a store."""
    digest = hashlib.blake2b(output.encode(), digest_size=8).hexdigest()
    return os.path.join(tempfile.gettempdir(), f"diht_jax-duplicates-{os.getuid()}-{digest}")


def forget_copies(output: str) -> None:
    """Removes what was fetched of an output folder."""
    shutil.rmtree(cache_folder(output), ignore_errors=True)


def fetch(path: str, output: str) -> str:
    """The path of a local file with these contents.

    Args:
        path: of a local file, which is its own copy, or a URL.
        output: the output folder that the file belongs to.
    """
    if not is_remote(path):
        return path
    size, version = input_version(path)
    identity = f"{path}\n{size} {version}"
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return cached_copy(path, digest, size, cache_folder(output))


def write_columns(path: str, columns: dict[str, Any]) -> None:
    """Writes columns of equal length, NumPy or Arrow arrays, to a file that appears whole."""
    import pyarrow

    batch = pyarrow.record_batch({name: pyarrow.array(part) for name, part in columns.items()})
    with (
        files.local_output(path) as local,
        pyarrow.ipc.new_file(str(local), batch.schema) as writer,
    ):
        writer.write_batch(batch)


def open_batch(path: str, output: str) -> Any:
    """Opens what `write_columns` wrote, as a record batch that is mapped into memory."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(fetch(path, output))).get_batch(0)


def open_columns(path: str, output: str) -> dict[str, np.ndarray]:
    """Columns of numbers that `write_columns` wrote, mapped into memory."""
    batch = open_batch(path, output)
    return {name: batch.column(name).to_numpy() for name in batch.schema.names}


_open_table = functools.lru_cache(maxsize=_OPEN_UNITS)(open_batch)


@functools.lru_cache(maxsize=_OPEN_UNITS)
def _open_array(path: str, output: str) -> np.ndarray:
    return np.load(fetch(path, output), mmap_mode="r")


def open_rows(output: str, paths: Sequence[str], counts: Sequence[int]) -> Rows:
    """The rows of units as they are now.

    Args:
        output: the output folder.
        paths: files with the columns of each unit.
        counts: rows of each unit.
    """
    for opened in (_open_table, _open_array):
        opened.cache_clear()  # a unit may have been scanned again
    return Rows(output, tuple(paths), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of all units.

    Attributes:
        output: the output folder.
        paths: files with the columns of each unit.
        starts: int64 [units + 1], the number of each unit's first row.
    """

    output: str
    paths: tuple[str, ...]
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str) -> np.ndarray:
        """A column of numbers, of all rows."""
        units = range(len(self.paths))
        return np.concatenate([self._table(unit).column(name).to_numpy() for unit in units])

    def has_embedding(self) -> np.ndarray:
        """Marks the rows whose embedding is not missing, and has a direction: bool [rows].

        Raises:
            ValueError: units have embeddings of several sizes.
        """
        found, widths = [], set()
        for unit in range(len(self.paths)):
            embeddings = self._array(unit, EMBEDDINGS)
            found.append(np.any(embeddings != 0, axis=1))
            widths.update({embeddings.shape[1]} if found[-1].any() else ())
        if len(widths) > 1:
            sizes = ", ".join(map(str, sorted(widths)))
            raise ValueError(f"embeddings of several sizes: {sizes}; expected those of one model")
        return np.concatenate(found)

    def unit_keys(self, unit: int) -> Any:
        """The keys of a unit, as a pyarrow array."""
        return self._table(unit).column("key")

    def keys(self, rows: np.ndarray) -> Any:
        """The keys of rows, as a pyarrow array."""
        import pyarrow

        parts = [pyarrow.array([], pyarrow.large_string())]
        numbers = [np.empty(0, np.int64)]
        for unit, positions, local in self._by_unit(rows):
            parts.append(self.unit_keys(unit).take(pyarrow.array(local)))
            numbers.append(positions)
        order = np.argsort(np.concatenate(numbers))
        return pyarrow.concat_arrays(parts).take(pyarrow.array(order))

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Embeddings of rows that have one, float32 [n, d], each of length 1."""
        parts = [(p, self._array(u, EMBEDDINGS)[local]) for u, p, local in self._by_unit(rows)]
        found = np.empty((len(rows), parts[0][1].shape[1] if parts else 0), np.float32)
        for positions, part in parts:
            found[positions] = part
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def greys(self, rows: np.ndarray) -> np.ndarray:
        """Thumbnails of rows, uint8 [n, side, side]."""
        found = np.empty((len(rows), SIDE, SIDE), np.uint8)
        for unit, positions, local in self._by_unit(rows):
            found[positions] = self._array(unit, GREYS)[local]
        return found

    def unit_of(self, rows: np.ndarray) -> np.ndarray:
        """The number of the unit of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def _table(self, unit: int) -> Any:
        return _open_table(self.paths[unit], self.output)

    def _array(self, unit: int, ending: str) -> np.ndarray:
        return _open_array(self.paths[unit] + ending, self.output)

    def _by_unit(self, rows: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Unit, positions in `rows`, and numbers within the unit."""
        units = self.unit_of(rows)
        order = np.argsort(units, kind="stable")
        found, first = np.unique(units[order], return_index=True)
        groups = np.split(order, first[1:]) if len(rows) else []
        return [
            (int(unit), positions, rows[positions] - self.starts[unit])
            for unit, positions in zip(found, groups, strict=True)
        ]
