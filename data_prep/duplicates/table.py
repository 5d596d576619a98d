"""The table that other programs look keys up in: which pairs are duplicates, and of which.

duplicates/    a row for each pair of a unit, in the unit's file, NNNNN.parquet
dropped.arrow  a row for each dropped pair whose key no other pair has, in the order of a hash
               of the key: it is mapped into memory, and all workers of a machine share it
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from data_prep.duplicates.rows import Rows, hash_keys, open_columns, write_columns
from data_prep.duplicates.search import Clusters, Found, follow_to_kept
from diht_jax.readers.base import SourceShard
from diht_jax.storage import files

TABLE = "duplicates"
LOOKUP = "dropped.arrow"
SUMMARY = "duplicates.json"  # written last: the folder is complete with it
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
    import pyarrow.parquet

    folder = files.join(rows.output, TABLE)
    files.make_folder(folder)
    alike = rows.take("key", found.alike)
    of_dropped = {
        "similarity": pyarrow.array(found.similarity),
        "duplicate_of": alike.cast(pyarrow.string()),
        "kept_key": rows.take("key", follow_to_kept(found, found.alike)).cast(pyarrow.string()),
    }
    places = np.full(len(rows), -1)
    places[found.dropped] = np.arange(len(found.dropped))
    kinds = np.full(len(rows), len(KINDS), np.int8)
    kinds[found.dropped] = found.kind
    cluster_of = np.full(len(rows), -1, np.int32)
    cluster_of[clusters.rows] = clusters.members[:, 0]
    names = pyarrow.array([*KINDS, "kept"])
    for unit, (start, stop) in enumerate(itertools.pairwise(rows.starts)):
        place, cluster = places[start:stop], cluster_of[start:stop]
        numbers = pyarrow.array(place, mask=place < 0)
        table = pyarrow.table(
            {
                "key": rows.of_unit(unit).column("key").cast(pyarrow.string()),
                "kind": pyarrow.DictionaryArray.from_arrays(kinds[start:stop], names),
                "cluster": pyarrow.array(cluster, mask=cluster < 0),
                **{name: column.take(numbers) for name, column in of_dropped.items()},
            }
        )
        with files.local_output(files.join(folder, f"{unit:05d}.parquet")) as local:
            pyarrow.parquet.write_table(table, local)
    own = {f"{unit:05d}.parquet" for unit in range(len(rows.paths))}
    for name in set(files.list_names(folder)) - own:
        files.remove(files.join(folder, name))
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
    digest = write_columns(files.join(rows.output, LOOKUP), columns)
    return {"pairs_of_repeated_keys": int(counts[counts > 1].sum()), "digest": digest}


def read_summary(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads `duplicates.json`; None where the folder is not complete.

    "inputs" has `hash_input` of the shards whose pairs are in the table.
    """
    return files.read_object(files.join(folder, SUMMARY))


def hash_input(source: SourceShard) -> str:
    """16 hexadecimal digits of the name and size of a shard's file."""
    row = [os.path.basename(source.path), source.identity()["size_bytes"]]
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest()


class Lookup:
    """Finds keys in the table of a folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Maps the table into memory.

        Raises:
            FileNotFoundError: there is none.
        """
        folder = os.fspath(folder)
        self._columns = open_columns(files.join(folder, LOOKUP), folder)

    def find(self, keys: Sequence[str]) -> list[Copy | None]:
        """Finds the entry of each key; None for pairs that are no duplicates."""
        hashes, known = hash_keys(keys), self._columns["hash"]
        rows = np.searchsorted(known, hashes)
        return [
            self._read(row) if row < len(known) and known[row] == wanted else None
            for row, wanted in zip(rows.tolist(), hashes, strict=True)
        ]

    def _read(self, row: int) -> Copy:
        columns = self._columns
        return Copy(
            KINDS[columns["kind"][row]],
            float(columns["similarity"][row]),
            columns["duplicate_of"][row].as_py(),
        )
