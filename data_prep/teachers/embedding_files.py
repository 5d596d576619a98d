"""Files of keys and embeddings, such as `python -m diht_jax.embed` writes them.

Npz has the arrays `key` [n] and `image_emb` [n, d], parquet has such columns.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from diht_jax.readers.array_files import read_npz_array
from diht_jax.storage import files

SUFFIXES = (".npz", ".parquet")


def check_digest(path: str, local: str) -> None:
    """Compares a file of `diht_jax.embed` with the CRC-32 in the `.json` next to it.

    Args:
        path: path or URL of the file; one by others, without such a `.json`, is right as it is.
        local: the file, or a local copy of it.

    Raises:
        ValueError: they differ.
    """
    stated = files.read_object(f"{path.rpartition('.')[0]}.json") or {}
    if "crc32" in stated and stated["crc32"] != zlib.crc32(files.read_bytes(local)):
        raise ValueError(
            f"{path}: damaged, since its CRC-32 is not that of the .json next to it; delete both "
            "and run diht_jax.embed again"
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


def has_field(path: str, field: str) -> bool:
    """Tells whether a local file has an array or a column; False where it cannot be read."""
    try:
        _read_field(path, field)
    except ValueError:
        return False
    return True


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
