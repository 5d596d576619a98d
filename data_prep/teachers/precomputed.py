"""Teacher that looks up precomputed embeddings by the key of a record.

The files are like those of `python -m diht_jax.embed`: npz with arrays `key` [n] and `image_emb`
[n, d], or parquet with such columns.
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


class EmbeddingTable(Teacher):
    """A teacher that looks embeddings up by key, without using images.

    Holds all keys in memory, and the embeddings of a few files.
    """

    def __init__(
        self, files: str | None, key_field: str, embedding_field: str, batch_size: int = 64
    ):
        """Reads the keys of all files.

        Raises:
            ValueError: no file is found, a file is damaged or lacks a field, or a key occurs twice.
        """
        self._embedding_field, self._batch_size = embedding_field, batch_size
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
                self._load(path)  # must be empty too; no later look-up would check this file
            for row, key in enumerate(keys):
                if key in self._rows:
                    raise ValueError(
                        f"{path}: key '{key}' stands in '{self._rows[key][0]}' as well; every key "
                        "must have one embedding"
                    )
                self._rows[key] = path, row

    def __len__(self) -> int:
        return len(self._rows)

    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """See `Teacher.embed`."""
        records = iter(records)
        while chunk := list(itertools.islice(records, self._batch_size)):
            found = [self.get(record.key) for record in chunk]
            yield ["no_embedding" if vector is None else vector for vector in found]

    def example_keys(self) -> list[str]:
        """See `Teacher.example_keys`."""
        return list(itertools.islice(self._rows, 2))

    def get(self, key: str) -> np.ndarray | None:
        """Returns the embedding of a key, float32 [d], or None if no file has the key.

        Raises:
            ValueError: the file has no valid embeddings, or other sizes than earlier files, or was
                changed since its keys were read.
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


def default_config() -> ml_collections.ConfigDict:
    """Returns the default config section `teacher.precomputed`."""
    c = ml_collections.ConfigDict()
    c.files = placeholder(str)  # npz or parquet files: a file, folder or glob
    c.key_field = "key"  # column or array with the keys
    c.embedding_field = "image_emb"  # column or array with the embeddings
    return c


def describe(config: ml_collections.ConfigDict) -> TeacherInfo:
    """Describes the teacher by the names, sizes and modification times of its files."""
    identity = {
        "kind": "precomputed",
        "files": [[os.path.abspath(path), *_version(path)] for path in _find_files(config.files)],
        "fields": [config.key_field, config.embedding_field],
    }
    # In this process, so that only one copy of the table exists.
    return TeacherInfo(
        identity, in_this_process=True, name="precomputed", data_keys=("files", "fields")
    )


def load(config: ml_collections.ConfigDict, batch_size: int) -> EmbeddingTable:
    """Reads the keys of the files in the section `teacher.precomputed`."""
    table = EmbeddingTable(config.files, config.key_field, config.embedding_field, batch_size)
    table.info = describe(config)
    return table


def _version(path: str) -> tuple[int, int]:
    """Returns size in bytes and modification time of a file."""
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
    elif os.path.isfile(files):  # the name of a file may contain brackets
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
    """Checks a file of `diht_jax.embed` against the CRC-32 in the `.json` next to it.

    Args:
        path: path or URL of the file. Files without such a `.json` are not checked.
        local: the file itself or a local copy.

    Raises:
        ValueError: the checksums differ.
    """
    described = f"{path.rpartition('.')[0]}.json"
    stated = files.read_object(described) or {}
    if "crc32" in stated and stated["crc32"] != zlib.crc32(files.read_bytes(local)):
        raise ValueError(
            f"{path}: damaged, since its CRC-32 is not that in {described}; delete both and run "
            "diht_jax.embed again"
        )


def read_keys(path: str, field: str) -> list[str]:
    """Reads the keys in a local file. Raises ValueError unless they are text, UTF-8 or integers."""
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
    """Reads the embeddings in a local file, float32 [n, d]; invalid ones raise a ValueError."""
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
    """Returns an array of an npz, or a chunked array of a parquet file."""
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
