"""Texts and names of files in the layouts of benchmarks, local or in a store."""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Sequence
from typing import Any

from diht_jax.storage.files import exists, find_inputs, read_bytes
from diht_jax.storage.retries import StorageError
from diht_jax.storage.stores import is_remote


def read_text(path: str) -> str:
    """Reads a UTF-8 text file, local or in a store, without a byte order mark.

    Raises:
        ValueError: there is none, or it is no such text.
        StorageError: it cannot be read, now and after some attempts.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except StorageError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error


def read_json(path: str, kind: type, what: str) -> Any:
    """Reads a JSON file, local or in a store, whose value is of a kind, `list` or `dict`.

    Raises:
        ValueError: no such file, or another value; says `what` is expected.
    """
    try:
        value = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what} ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected {what}")
    return value


def list_names(folder: str) -> list[str]:
    """The names of the files in a folder, sorted; without hidden ones."""
    if is_remote(folder):
        names = [posixpath.basename(url) for url in find_inputs(folder)]
    else:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if not name.startswith("."))


def require(path: str, what: str) -> None:
    """Raises ValueError where there is no such file or folder."""
    if not exists(path):
        raise ValueError(f"nothing at '{path}'; expected {what}")


def check_texts(path: str, number: Any, row: Any, names: Sequence[str]) -> None:
    """Raises ValueError where a row of a file lacks one of these texts; names file and row."""
    missing = [n for n in names if not (isinstance(row, dict) and isinstance(row.get(n), str))]
    if missing:
        raise ValueError(f"{path}: row {number!s:.20}: expected texts as {', '.join(missing)}")
