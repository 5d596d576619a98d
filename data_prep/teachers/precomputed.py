"""Embeddings that were computed before, found by the key of a record.

Their files are such as `python -m diht_jax.embed` writes: npz has the arrays `key` [n] and
`image_emb` [n, d], parquet has such columns.
"""

from __future__ import annotations

import functools
import glob
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from data_prep.teachers.base import Embedded, Teacher, TeacherInfo, TeacherKind
from diht_jax.readers.array_files import read_npz_array
from diht_jax.records.schema import Record
from diht_jax.storage import files

SUFFIXES = (".npz", ".parquet")
_OPEN_FILES = 4


class EmbeddingTable:
    """Embeddings by key. All keys are held in memory, and the embeddings of a few files."""

    def __init__(self, files: str | None, key_field: str, embedding_field: str):
        """Reads the keys.

        Raises:
            ValueError: nothing is found, a file is damaged or lacks a field, or a key occurs twice.
        """
        self._embedding_field = embedding_field
        self._rows: dict[str, tuple[str, int]] = {}
        self._lengths: dict[str, int] = {}
        self._versions: dict[str, tuple[int, int]] = {}
        self._dim: int | None = None
        self._open = functools.lru_cache(maxsize=_OPEN_FILES)(self._load)
        for path in _find_files(files):
            self._versions[path] = _version(path)
            check_digest(path, path)
            keys = read_keys(path, key_field)
            self._lengths[path] = len(keys)
            if not keys:
                self._load(path)  # empty as well, or else nobody would ever look at it
            for row, key in enumerate(keys):
                if key in self._rows:
                    raise ValueError(
                        f"{path}: key '{key}' stands in '{self._rows[key][0]}' as well; every key "
                        "must have one embedding"
                    )
                self._rows[key] = path, row

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        """All keys."""
        return iter(self._rows)

    def get(self, key: str) -> np.ndarray | None:
        """float32 [d], or None where no file has the key.

        Raises:
            ValueError: the values of its file are no embeddings, or of another size than before, or
                it was written again since its keys were read.
        """
        if key not in self._rows:
            return None
        path, row = self._rows[key]
        return self._open(path)[row]

    def _load(self, path: str) -> np.ndarray:
        values, num_keys = read_embeddings(path, self._embedding_field), self._lengths[path]
        if _version(path) != self._versions[path]:
            raise ValueError(
                f"{path}: it was written again after its keys were read; run the command again "
                "when nothing writes to it any more"
            )
        if len(values) != num_keys:
            raise ValueError(f"{path}: {num_keys} keys, but {len(values)} embeddings")
        if num_keys:
            self._dim = self._dim or values.shape[1]
            if self._dim != values.shape[1]:
                raise ValueError(
                    f"{path}: embeddings of size {values.shape[1]}, of other files {self._dim}"
                )
        return values


class PrecomputedTeacher(Teacher):
    """A table as a teacher; no image is looked at."""

    def __init__(self, table: EmbeddingTable, info: TeacherInfo, batch_size: int):
        self.info = info
        self._table = table
        self._batch_size = batch_size

    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """See `Teacher.embed`."""
        records = iter(records)
        while chunk := list(itertools.islice(records, self._batch_size)):
            found = [self._table.get(record.key) for record in chunk]
            yield ["no_embedding" if vector is None else vector for vector in found]

    def example_keys(self) -> list[str]:
        """See `Teacher.example_keys`."""
        return list(itertools.islice(self._table, 2))


def default_config() -> ml_collections.ConfigDict:
    """The config section `teacher.precomputed`."""
    c = ml_collections.ConfigDict()
    c.files = placeholder(str)  # npz or parquet: file, folder or glob
    c.key_field = "key"  # column or array of the keys
    c.embedding_field = "image_emb"  # and of the embeddings
    return c


def describe(config: ml_collections.ConfigDict) -> TeacherInfo:
    """Names, sizes and times of the files."""
    identity = {
        "kind": "precomputed",
        "files": [[os.path.abspath(path), *_version(path)] for path in _find_files(config.files)],
        "fields": [config.key_field, config.embedding_field],
    }
    # In this process, so that there is one copy of the table.
    return TeacherInfo(
        identity, in_this_process=True, name="precomputed", data_keys=("files", "fields")
    )


def load(config: ml_collections.ConfigDict, batch_size: int) -> PrecomputedTeacher:
    """Reads the keys; takes section `teacher.precomputed`, and records at once."""
    table = EmbeddingTable(config.files, config.key_field, config.embedding_field)
    return PrecomputedTeacher(table, describe(config), batch_size)


def _version(path: str) -> tuple[int, int]:
    """Bytes and time of change of a file."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _find_files(files: str | None) -> list[str]:
    if not files:
        raise ValueError(
            "config.teacher.precomputed.files is not set: expected npz or parquet files with keys "
            "and embeddings, such as those of `python -m diht_jax.embed`"
        )
    if os.path.isdir(files):
        candidates = sorted(entry.path for entry in os.scandir(files))
    elif os.path.isfile(files):  # whose name may have brackets
        candidates = [files]
    else:
        candidates = sorted(glob.glob(files, recursive=True))
    found = [path for path in candidates if path.endswith(SUFFIXES) and os.path.isfile(path)]
    if not found:
        raise ValueError(
            f"config.teacher.precomputed.files='{files}': no {' or '.join(SUFFIXES)} file there"
        )
    return found


def check_digest(path: str, local: str) -> None:
    """Compares a file of `diht_jax.embed` with the CRC-32 in the `.json` next to it.

    Args:
        path: path or URL of the file; one by others, without such a `.json`, is right as it is.
        local: the file, or a local copy of it.

    Raises:
        ValueError: they differ.
    """
    described = f"{path.rpartition('.')[0]}.json"
    stated = files.read_object(described) or {}
    if "crc32" in stated and stated["crc32"] != zlib.crc32(files.read_bytes(local)):
        raise ValueError(
            f"{path}: damaged, since its CRC-32 is not that in {described}; delete both and run "
            "diht_jax.embed again"
        )


def read_keys(path: str, field: str) -> list[str]:
    """The keys in a local file: texts, bytes in UTF-8 or whole numbers; else a ValueError."""
    values = _read_field(path, field)
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"{path}: '{field}' has the shape {list(values.shape)}; expected [n]")
    keys = values.tolist() if isinstance(values, np.ndarray) else values.to_pylist()
    for row, key in enumerate(keys):
        if isinstance(key, bytes):
            try:
                keys[row] = key.decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: '{field}' of row {row} is no UTF-8 ({error})") from error
        elif isinstance(key, int) and not isinstance(key, bool):
            keys[row] = str(key)
        elif not isinstance(key, str):
            raise ValueError(f"{path}: '{field}' of row {row} is {key!r:.80}; expected a text")
    return keys


def read_embeddings(path: str, field: str) -> np.ndarray:
    """The embeddings in a local file, float32 [n, d]; a ValueError where they are none."""
    values = _read_field(path, field)
    if not isinstance(values, np.ndarray):
        try:
            values = np.stack(values.to_numpy()) if len(values) else np.zeros((0, 1), np.float32)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(
                f"{path}: '{field}' is {values.type}; expected lists of one length of "
                f"floating-point numbers ({error})"
            ) from error
    if values.ndim != 2 or not np.issubdtype(values.dtype, np.floating) or not values.shape[1]:
        raise ValueError(
            f"{path}: '{field}' is {values.dtype} {list(values.shape)}; expected floating-point "
            "[n, d]"
        )
    with np.errstate(over="ignore"):
        values = values.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{path}: some embeddings are not finite in float32")
    return values


def _read_field(path: str, field: str) -> Any:
    """A NumPy array of an npz, or a chunked array of a parquet file."""
    if path.endswith(".npz"):
        return read_npz_array(path, field)
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if field in names:
            return pyarrow.parquet.read_table(path, columns=[field])[field]
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read as parquet: {error}") from error
    raise ValueError(f"{path}: no field '{field}'; it has {', '.join(names[:10]) or 'nothing'}")


TEACHER = TeacherKind(default_config, describe, load)
