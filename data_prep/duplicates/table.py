"""The table that other programs look keys up in: which pairs are duplicates, and of which.

`dropped.arrow` has a row for each dropped pair, in the order of a hash of its key, so that it is
searched where it lies: it is mapped into memory, and all workers of a machine share it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.duplicates import mapped
from data_prep.jobs import files

LOOKUP = "dropped.arrow"
SUMMARY = "duplicates.json"  # written last: the folder is complete with it
EXACT, NEAR = "exact", "near"
KINDS = (EXACT, NEAR)


class Found(NamedTuple):
    """What the table holds of a dropped pair.

    Attributes:
        kind: one of `KINDS`.
        similarity: with the other picture, a cosine or a correlation; 1 for an exact copy.
        duplicate_of: key of the pair with that picture.
    """

    kind: str
    similarity: float
    duplicate_of: str


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """uint64 [n]."""
    texts = (key.encode("utf-8", "surrogatepass") for key in keys)
    data = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
    return np.frombuffer(data, "<u8")


def write_lookup(
    folder: str,
    hashes: np.ndarray,
    kinds: np.ndarray,
    similarities: np.ndarray,
    duplicate_of: Any,
) -> str:
    """Writes `dropped.arrow`.

    Args:
        folder: where it goes.
        hashes: uint64 [n], of `hash_keys`.
        kinds: uint8 [n], positions in `KINDS`.
        similarities: float [n].
        duplicate_of: n keys, a pyarrow array.

    Returns:
        A hash of what it holds.
    """
    import pyarrow

    order = np.argsort(hashes, kind="stable")
    columns = {
        "hash": pyarrow.array(hashes[order]),
        "kind": pyarrow.array(kinds[order].astype(np.uint8)),
        "similarity": pyarrow.array(similarities[order].astype(np.float32)),
        "duplicate_of": duplicate_of.take(pyarrow.array(order)),
    }
    batch = pyarrow.record_batch(columns)
    with (
        files.local_output(files.join(folder, LOOKUP)) as path,
        pyarrow.ipc.new_file(str(path), batch.schema) as writer,
    ):
        writer.write_batch(batch)
    digest = hashlib.blake2b(digest_size=16)
    for column in batch.columns:
        for buffer in column.buffers():
            digest.update(buffer or b"")
    return digest.hexdigest()


def write_summary(folder: str, summary: dict[str, Any]) -> None:
    """Writes `duplicates.json`."""
    text = json.dumps(summary, indent=1) + "\n"
    files.write_bytes(files.join(folder, SUMMARY), text.encode())


def read_summary(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `write_summary` wrote; None where the folder is not complete."""
    return files.read_object(files.join(folder, SUMMARY))


class Lookup:
    """Finds keys in the table of a folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Maps the table into memory.

        Raises:
            FileNotFoundError: there is none.
        """
        import pyarrow

        folder = os.fspath(folder)
        path = mapped.fetch(files.join(folder, LOOKUP), mapped.cache_folder(folder))
        source = pyarrow.memory_map(path)
        batch = pyarrow.ipc.open_file(source).get_batch(0)
        self._hashes = batch.column("hash").to_numpy()
        self._kinds = batch.column("kind").to_numpy()
        self._similarities = batch.column("similarity").to_numpy()
        self._duplicate_of = batch.column("duplicate_of")

    def find(self, keys: Sequence[str]) -> list[Found | None]:
        """What is known of each key; None for pairs that are no duplicates."""
        hashes = hash_keys(keys)
        rows = np.searchsorted(self._hashes, hashes)
        rows = np.minimum(rows, max(len(self._hashes) - 1, 0))
        if not len(self._hashes):
            return [None] * len(keys)
        is_known = self._hashes[rows] == hashes
        return [
            self._row(int(row)) if known else None
            for row, known in zip(rows, is_known, strict=True)
        ]

    def _row(self, row: int) -> Found:
        return Found(
            KINDS[self._kinds[row]],
            float(self._similarities[row]),
            self._duplicate_of[row].as_py(),
        )
