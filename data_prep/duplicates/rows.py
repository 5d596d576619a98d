"""Rows of all scanned units, numbered in the order of the units, in memory-mapped files.

The Arrow file of a unit has a row for each pair:

    key                  text
    hash                 uint64, hash of the key
    content              uint64 [2], both halves of a hash of the encoded image
    caption              uint64, hash of the text; 0 if unknown
    pixels               int64, number of pixels; 0 if the image is unreadable
    embedding            float16 [d], zeros if missing; no column if all are missing
    thumbnail            uint8 [1536]; no column for precomputed embeddings alone

Each machine fetches remote files once, into a folder below the system's temporary folder that all
processes of the job share.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diht_jax.storage import files
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.stores import input_version, is_remote, retry

CAPTION, EMBEDDING, THUMBNAIL = "caption", "embedding", "thumbnail"

_OPEN_UNITS = 512


class Near(NamedTuple):
    """Rows that repeat another row, by row number.

    Attributes:
        rows: int64 [m].
        alike: int64 [m], the most similar row with a better rank.
        similarity: float32 [m], similarity of the two rows.
    """

    rows: np.ndarray
    alike: np.ndarray
    similarity: np.ndarray


NONE = Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def hash_texts(texts: Sequence[str]) -> np.ndarray:
    """Hashes of texts, uint64 [n]."""
    encoded = (text.encode("utf-8", "surrogatepass") for text in texts)
    data = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in encoded)
    return np.frombuffer(data, "<u8")


def write_columns(path: str, columns: Mapping[str, Any]) -> str:
    """Writes columns of equal length to a file atomically; returns a hash of its bytes.

    A column is an Arrow array, or a NumPy array [n] or [n, width].
    """
    import pyarrow

    arrays = dict(columns)
    for name, column in columns.items():
        if isinstance(column, np.ndarray) and column.ndim == 2:
            flat = pyarrow.array(column.ravel())
            arrays[name] = pyarrow.FixedSizeListArray.from_arrays(flat, column.shape[1])
    batch = pyarrow.record_batch({name: pyarrow.array(column) for name, column in arrays.items()})
    with files.local_output(path) as local:
        with pyarrow.ipc.new_file(str(local), batch.schema) as writer:
            writer.write_batch(batch)
        return _hash_file(str(local))


def _hash_file(local: str) -> str:
    with open(local, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def check_columns(path: str, output: str, digest: str) -> str:
    """Checks the hash of a file, once per process; returns the path of the local file.

    Damaged files must not be mapped, because Arrow follows the offsets stored in a file.

    Raises:
        ValueError: the file is gone, or its contents have changed.
    """
    try:
        local = _fetch(path, output)
        state = files.stat(local)
    except FileNotFoundError as error:
        raise ValueError("it is gone") from error
    if _hash_state(local, state.st_size, state.st_mtime_ns) != digest:
        if local != path:
            os.unlink(local)  # the local copy may be the damaged file
        raise ValueError("it is damaged: its bytes are not those that were written")
    return local


@functools.lru_cache(maxsize=_OPEN_UNITS)
def _hash_state(local: str, size: int, changed_ns: int) -> str:
    """Hashes a file; size and modification time are part of the cache key."""
    return retry(lambda: _hash_file(local), local)


def map_batch(local: str) -> Any:
    """Memory-maps the record batch of a file checked by `check_columns`."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(local)).get_batch(0)


def _to_numpy(column: Any) -> Any:
    """Converts a column of numbers to [n] or [n, width]; returns text columns unchanged."""
    import pyarrow

    if pyarrow.types.is_large_string(column.type):
        return column
    if pyarrow.types.is_fixed_size_list(column.type):
        return column.flatten().to_numpy().reshape(len(column), column.type.list_size)
    return column.to_numpy()


def _fetch(path: str, output: str) -> str:
    """Returns the path of a local file or local copy with the contents of `path`."""
    if not is_remote(path):
        return path
    size, version = input_version(path)
    digest = hashlib.blake2b(f"{path}\n{size} {version}".encode(), digest_size=16).hexdigest()
    return cached_copy(path, digest, size, _cache_folder(output))


def _cache_folder(output: str) -> str:
    digest = hashlib.blake2b(output.encode(), digest_size=8).hexdigest()
    return os.path.join(tempfile.gettempdir(), f"diht_jax-duplicates-{os.getuid()}-{digest}")


def forget_copies(output: str) -> None:
    """Removes the local copies of files from an output folder."""
    shutil.rmtree(_cache_folder(output), ignore_errors=True)


@functools.lru_cache(maxsize=_OPEN_UNITS)
def _open_unit(path: str, output: str) -> Any:
    return map_batch(_fetch(path, output))


def open_rows(output: str, paths: Sequence[str]) -> Rows:
    """Opens the current rows of units."""
    _open_unit.cache_clear()  # units may have been scanned again
    counts = [_open_unit(path, output).num_rows for path in paths]
    return Rows(output, tuple(paths), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of all units.

    Attributes:
        paths: path of each unit's file.
        starts: int64 [units + 1], number of the first row of each unit.
    """

    output: str
    paths: tuple[str, ...]
    starts: np.ndarray

    def __len__(self) -> int:
        return int(self.starts[-1])

    def of_unit(self, unit: int) -> Any:
        """Returns the rows of a unit as an Arrow record batch."""
        return _open_unit(self.paths[unit], self.output)

    def unit_of(self, rows: np.ndarray) -> np.ndarray:
        """Returns the unit number of each row."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def column(self, name: str) -> np.ndarray:
        """Returns a numeric column of all rows."""
        units = range(len(self.paths))
        return np.concatenate([_to_numpy(self.of_unit(unit).column(name)) for unit in units])

    def take(self, name: str, rows: np.ndarray) -> Any:
        """Returns a column of some rows, in their order: an Arrow array of text, else NumPy."""
        import pyarrow

        if not len(rows):
            return _to_numpy(self.of_unit(0).column(name)[:0])
        units = self.unit_of(rows)
        order = np.argsort(units, kind="stable")
        found, first = np.unique(units[order], return_index=True)
        parts = [
            self.of_unit(unit).column(name).take(pyarrow.array(rows[own] - self.starts[unit]))
            for unit, own in zip(found, np.split(order, first[1:]), strict=True)
        ]
        return _to_numpy(pyarrow.concat_arrays(parts).take(pyarrow.array(np.argsort(order))))

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Returns the embeddings of rows that have one, float32 [n, d], normalised to length 1."""
        found = self.take(EMBEDDING, rows).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def has_embedding(self) -> np.ndarray:
        """Marks the rows that have a non-zero embedding: bool [rows].

        Raises:
            ValueError: units have embeddings of different sizes.
        """
        found, widths = np.zeros(len(self), bool), set()
        for unit, start in enumerate(self.starts[:-1]):
            batch = self.of_unit(unit)
            if EMBEDDING not in batch.schema.names:
                continue
            embeddings = _to_numpy(batch.column(EMBEDDING))
            if embeddings.any():
                found[start : start + len(embeddings)] = embeddings.any(axis=1)
                widths.add(embeddings.shape[1])
        if len(widths) > 1:
            sizes = ", ".join(map(str, sorted(widths)))
            raise ValueError(f"embeddings of several sizes: {sizes}; expected those of one model")
        return found
