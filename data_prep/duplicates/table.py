"""The table that other programs look keys up in: which pairs are duplicates, and of which.

`dropped.arrow` has a row for each dropped pair, in the order of a hash of its key, so that it is
searched where it lies: it is mapped into memory, and all workers of a machine share it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.duplicates import mapped
from diht_jax.readers.base import SourceShard
from diht_jax.storage import files

LOOKUP = "dropped.arrow"
SUMMARY = "duplicates.json"  # written last: the folder is complete with it
INPUTS = "inputs.json"  # hashes of names and sizes of the shards whose pairs are in the table
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


def write_lookup(folder: str, parts: Iterable[Any]) -> str:
    """Writes `dropped.arrow`.

    Args:
        folder: where it goes.
        parts: record batches with the columns "hash", of `hash_keys`, "kind", a position in
            `KINDS`, "similarity" and "duplicate_of". Each has a range of the hashes, of equal size
            and in their order, and is sorted by them. One is held at a time.

    Returns:
        A hash of what it holds.
    """
    import pyarrow

    digest = hashlib.blake2b(digest_size=16)
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(files.local_output(files.join(folder, LOOKUP)))
        writer = None
        for batch in parts:
            if writer is None:
                writer = stack.enter_context(pyarrow.ipc.new_file(str(path), batch.schema))
            writer.write_batch(batch)
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


def hash_input(source: SourceShard) -> str:
    """16 hexadecimal digits of the name and size of a shard's file, wherever it lies."""
    row = [os.path.basename(source.path), source.identity()["size_bytes"]]
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest()


def write_inputs(folder: str, sources: Iterable[SourceShard]) -> None:
    """Writes `inputs.json`."""
    text = json.dumps({"inputs": sorted(set(map(hash_input, sources)))}, indent=1) + "\n"
    files.write_bytes(files.join(folder, INPUTS), text.encode())


def read_inputs(folder: str | os.PathLike[str]) -> set[str] | None:
    """The hashes that `write_inputs` wrote; None where the table does not state them."""
    found = files.read_object(files.join(folder, INPUTS))
    return None if found is None else set(found["inputs"])


def random_ranks(rows: np.ndarray, seed: int) -> np.ndarray:
    """float64 [n] in [0, 1): a random number of each row, whatever lies beside it."""
    x = rows.astype(np.uint64) + np.uint64(seed % 2**64) * np.uint64(0x9E3779B97F4A7C15)
    # The finaliser of splitmix64 (Steele et al. 2014).
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53


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
        file = pyarrow.ipc.open_file(pyarrow.memory_map(path))
        self._parts = [file.get_batch(number) for number in range(file.num_record_batches)]

    def find(self, keys: Sequence[str]) -> list[Found | None]:
        """What is known of each key; None for pairs that are no duplicates."""
        hashes = hash_keys(keys)
        found: list[Found | None] = [None] * len(keys)
        buckets = bucket_of(hashes, len(self._parts))
        for number in np.unique(buckets):
            part, mine = self._parts[number], np.flatnonzero(buckets == number)
            known = part.column("hash").to_numpy()
            rows = np.searchsorted(known, hashes[mine])
            for position, row in zip(mine.tolist(), rows.tolist(), strict=True):
                if row < len(known) and known[row] == hashes[position]:
                    found[position] = _read_row(part, row)
        return found


def bucket_of(hashes: np.ndarray, buckets: int) -> np.ndarray:
    """The range of uint64 hashes, of so many of equal size, in which each of them lies."""
    return (hashes >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)


def _read_row(part: Any, row: int) -> Found:
    return Found(
        KINDS[part.column("kind")[row].as_py()],
        part.column("similarity")[row].as_py(),
        part.column("duplicate_of")[row].as_py(),
    )
