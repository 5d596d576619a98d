"""Reads the texts, tables and pictures of benchmark layouts, local or in a store."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diht_jax.evaluation.embedding.entries import Units, divide
from diht_jax.readers.base import Skipped, read_image
from diht_jax.records.schema import Pair
from diht_jax.storage.files import map_many, read_bytes
from diht_jax.storage.stores import StorageError, is_remote


def read_text(path: str, what: str = "a text file") -> str:
    """Reads a UTF-8 text file, local or in a store; a byte order mark is removed.

    A missing file or other content is a ValueError that says `what` was expected. A StorageError
    means that the file cannot be read, even after several attempts.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except StorageError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: cannot be read as a UTF-8 text file ({error}); expected {what}"
        ) from error


def read_json(path: str, kind: type, what: str) -> Any:
    """Reads a JSON file with a `list` or `dict` as its value; errors as in `read_text`."""
    try:
        value = json.loads(read_text(path, what))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected {what} ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected {what}")
    return value


def read_csv(path: str, what: str, reader: Callable[..., Any] = csv.DictReader) -> list[Any]:
    """Reads the rows of a csv file with one of Python's readers; errors as in `read_text`."""
    try:
        return list(reader(io.StringIO(read_text(path, what))))
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read as csv ({error})") from error


def check_texts(path: str, number: Any, row: Any, names: Sequence[str]) -> None:
    """Raises ValueError, with file and row, if one of the named fields of a row is no text."""
    missing = [n for n in names if not (isinstance(row, dict) and isinstance(row.get(n), str))]
    if missing:
        raise ValueError(f"{path}: row {number!s:.20}: expected texts as {', '.join(missing)}")


# A picture's path below some folder, and its pairs (still without the image), or why it has none.
Item = tuple[str, "Sequence[Pair] | Skipped"]


def picture_units(root: str, items: Sequence[Item]) -> Units:
    """Divides pictures into units; a unit reads several pictures at a time from a store.

    Args:
        root: folder of the pictures, or its URL. Paths that lead out of it are refused.
        items: pictures; one that cannot be read is a single `Skipped`, however many pairs it has.
    """
    root = root if is_remote(root) else os.path.realpath(root)

    def read_item(item: Item) -> Sequence[Pair | Skipped]:
        name, pairs = item
        if isinstance(pairs, Skipped):
            return [pairs]
        image = read_image(root, name, name)
        if isinstance(image, Skipped):
            return [image]
        return [dataclasses.replace(pair, image=image) for pair in pairs]

    def read(part: Sequence[Item]) -> Iterator[Pair | Skipped]:
        for entries in map_many(read_item, part, root):
            yield from entries

    count = sum(1 if isinstance(pairs, Skipped) else len(pairs) for _, pairs in items)
    return Units(divide(items, read), lambda: count)
