"""The table that other programs look keys up in: which pairs are duplicates, and of which.

duplicates/    a row for each pair of a unit, in the unit's file, NNNNN.parquet
dropped.arrow  a row for each dropped pair whose key no other pair has, in the order of a hash
               of the key: it is mapped into memory, and all workers of a machine share it
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.duplicates.rows import Rows, hash_keys, open_batch, write_columns
from data_prep.duplicates.search import Clusters, Found, follow_to_kept
from diht_jax.readers.base import SourceShard
from diht_jax.storage import files

TABLE = "duplicates"
LOOKUP = "dropped.arrow"
SUMMARY = "duplicates.json"  # written last: the folder is complete with it
INPUTS = "inputs.json"  # hashes of names and sizes of the shards whose pairs are in the table
EXACT, NEAR = "exact", "near"
KINDS = (EXACT, NEAR)


class Copy(NamedTuple):
    """Entry of a dropped pair.

    Attributes:
        kind: one of `KINDS`.
        similarity: with the other picture, a cosine or a correlation; 1 for an exact copy.
        duplicate_of: key of the pair with that picture.
    """

    kind: str
    similarity: float
    duplicate_of: str


def write_tables(rows: Rows, found: Found, clusters: Clusters) -> dict[str, Any]:
    """Writes the table of each unit, and `dropped.arrow`.

    Returns:
        For the summary: "pairs_of_repeated_keys", which a filter by keys cannot tell apart, and
        "digest", a hash of what `dropped.arrow` holds.
    """
    import pyarrow

    folder = files.join(rows.output, TABLE)
    files.make_folder(folder)
    alike = rows.keys(found.alike)
    kept = rows.keys(follow_to_kept(found, found.alike))
    cluster_of = np.full(len(rows), -1, np.int32)
    cluster_of[clusters.rows] = clusters.members[:, 0]
    edges = np.searchsorted(found.dropped, rows.starts)
    for unit in range(len(rows.paths)):
        own = slice(int(edges[unit]), int(edges[unit + 1]))
        columns = (found.kind[own], found.similarity[own], alike[own], kept[own])
        _write_unit(
            files.join(folder, f"{unit:05d}.parquet"),
            rows.unit_keys(unit),
            cluster_of[rows.starts[unit] : rows.starts[unit + 1]],
            found.dropped[own] - rows.starts[unit],
            columns,
        )
    hashes = rows.column("hash")
    values, counts = np.unique(hashes, return_counts=True)
    dropped = hashes[found.dropped]
    order = np.argsort(dropped, kind="stable")
    order = order[~np.isin(dropped[order], values[counts > 1])]
    columns = {
        "hash": dropped[order],
        "kind": found.kind[order],
        "similarity": found.similarity[order],
        "duplicate_of": alike.take(pyarrow.array(order)),
    }
    write_columns(files.join(rows.output, LOOKUP), columns)
    digest = hashlib.blake2b(json.dumps(columns["duplicate_of"].to_pylist()).encode())
    for name in ("hash", "kind", "similarity"):
        digest.update(columns[name].tobytes())
    repeated = int(counts[counts > 1].sum())
    return {"pairs_of_repeated_keys": repeated, "digest": digest.hexdigest()[:32]}


def _write_unit(
    path: str, keys: Any, clusters: np.ndarray, dropped: np.ndarray, columns: tuple[Any, ...]
) -> None:
    """Writes a row for each pair of a unit, in their order.

    Args:
        path: of the file.
        keys: of all pairs.
        clusters: int32 [n], -1 for none.
        dropped: numbers of the dropped pairs.
        columns: of the dropped pairs: kind, similarity, keys of the other and of the kept pair.
    """
    import pyarrow
    import pyarrow.parquet

    kind, similarity, alike, kept = columns
    kinds = np.full(len(keys), len(KINDS), np.int8)
    kinds[dropped] = kind
    places = np.full(len(keys), -1)
    places[dropped] = np.arange(len(dropped))
    places = pyarrow.array(places, mask=places < 0)
    names = pyarrow.array([*KINDS, "kept"])
    table = pyarrow.table(
        {
            "key": keys.cast(pyarrow.string()),
            "kind": pyarrow.DictionaryArray.from_arrays(kinds, names),
            "cluster": pyarrow.array(clusters, mask=clusters < 0),
            "similarity": pyarrow.array(similarity).take(places),
            "duplicate_of": alike.take(places).cast(pyarrow.string()),
            "kept_key": kept.take(places).cast(pyarrow.string()),
        }
    )
    with files.local_output(path) as local:
        pyarrow.parquet.write_table(table, local)


def write_summary(folder: str, summary: dict[str, Any]) -> None:
    """Writes `duplicates.json`."""
    files.write_object(files.join(folder, SUMMARY), summary)


def read_summary(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads what `write_summary` wrote; None where the folder is not complete."""
    return files.read_object(files.join(folder, SUMMARY))


def hash_input(source: SourceShard) -> str:
    """16 hexadecimal digits of the name and size of a shard's file."""
    row = [os.path.basename(source.path), source.identity()["size_bytes"]]
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest()


def write_inputs(folder: str, sources: Iterable[SourceShard]) -> None:
    """Writes `inputs.json`."""
    hashes = sorted(set(map(hash_input, sources)))
    files.write_object(files.join(folder, INPUTS), {"inputs": hashes})


def read_inputs(folder: str | os.PathLike[str]) -> set[str] | None:
    """The hashes that `write_inputs` wrote; None where the table does not state them."""
    found = files.read_object(files.join(folder, INPUTS))
    return None if found is None else set(found["inputs"])


class Lookup:
    """Finds keys in the table of a folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Maps the table into memory.

        Raises:
            FileNotFoundError: there is none.
        """
        folder = os.fspath(folder)
        self._table = open_batch(files.join(folder, LOOKUP), folder)
        self._hashes = self._table.column("hash").to_numpy()

    def find(self, keys: Sequence[str]) -> list[Copy | None]:
        """Finds the entry of each key; None for pairs that are no duplicates."""
        hashes = hash_keys(keys)
        found: list[Copy | None] = []
        for row, wanted in zip(np.searchsorted(self._hashes, hashes), hashes, strict=True):
            is_there = row < len(self._hashes) and self._hashes[row] == wanted
            found.append(self._read(int(row)) if is_there else None)
        return found

    def _read(self, row: int) -> Copy:
        kind, similarity, alike = (
            self._table.column(name)[row].as_py() for name in ("kind", "similarity", "duplicate_of")
        )
        return Copy(KINDS[kind], similarity, alike)
