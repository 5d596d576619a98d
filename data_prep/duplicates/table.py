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
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from data_prep.duplicates.rows import (
    Rows,
    check_columns,
    hash_texts,
    map_batch,
    write_columns,
)
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
        "digest", a hash of `dropped.arrow`.
    """
    import pyarrow
    import pyarrow.parquet

    folder = files.join(rows.output, TABLE)
    files.make_folder(folder)
    dropped = found.dropped()
    kept_keys = rows.take("key", follow_to_kept(dropped, dropped.alike)).cast(pyarrow.string())
    alike = rows.take("key", found.alike)
    places, kinds = np.full(len(rows), -1), np.full(len(rows), len(KINDS), np.int8)
    places[found.rows], kinds[found.rows] = np.arange(len(found.rows)), found.kind
    of_dropped = np.full(len(rows), -1)
    of_dropped[dropped.rows] = np.arange(len(dropped.rows))
    cluster_of = np.full(len(rows), -1, np.int32)
    cluster_of[clusters.rows] = clusters.members[:, 0]
    names = pyarrow.array([*KINDS, "kept"])
    for unit, (start, stop) in enumerate(itertools.pairwise(rows.starts)):
        cluster = cluster_of[start:stop]
        own, own_dropped = (
            pyarrow.array(numbers, mask=numbers < 0)
            for numbers in (places[start:stop], of_dropped[start:stop])
        )
        table = pyarrow.table(
            {
                "key": rows.of_unit(unit).column("key").cast(pyarrow.string()),
                "kind": pyarrow.DictionaryArray.from_arrays(kinds[start:stop], names),
                "cluster": pyarrow.array(cluster, mask=cluster < 0),
                "similarity": pyarrow.array(found.similarity).take(own),
                "duplicate_of": alike.cast(pyarrow.string()).take(own),
                "other_caption": pyarrow.array(found.other_caption).take(own),
                "kept_key": kept_keys.take(own_dropped),
            }
        )
        with files.local_output(files.join(folder, f"{unit:05d}.parquet")) as local:
            pyarrow.parquet.write_table(table, local, write_page_checksum=True)
    own_names = {f"{unit:05d}.parquet" for unit in range(len(rows.paths))}
    for name in set(files.list_names(folder)) - own_names:
        files.remove(files.join(folder, name))
    hashes = rows.column("hash")
    values, counts = np.unique(hashes, return_counts=True)
    of_keys = hashes[dropped.rows]
    order = np.argsort(of_keys, kind="stable")
    order = order[~np.isin(of_keys[order], values[counts > 1])]
    columns = {
        "hash": of_keys[order],
        "kind": dropped.kind[order],
        "similarity": dropped.similarity[order],
        "duplicate_of": rows.take("key", dropped.alike[order]),
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


def is_whole(folder: str, summary: Mapping[str, Any]) -> bool:
    """Whether `dropped.arrow` is the one that the summary of the folder names."""
    try:
        check_columns(files.join(folder, LOOKUP), folder, summary["digest"])
    except (ValueError, KeyError) as error:
        logging.warning("%s: the tables are made again (%s)", folder, error)
        return False
    return True


class Lookup:
    """Finds keys in the table of a folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Maps the table into memory.

        Raises:
            ValueError: there is none, or it is damaged; names it.
        """
        folder = os.fspath(folder)
        summary = read_summary(folder)
        described = files.join(folder, SUMMARY)
        if summary is None and files.exists(described):
            raise ValueError(
                f"'{described}': damaged; run python -m data_prep.duplicates again, with this "
                "output"
            )
        if summary is None or "digest" not in summary:
            raise ValueError(
                f"'{folder}': no complete output of python -m data_prep.duplicates; run that "
                "command (again)"
            )
        path = files.join(folder, LOOKUP)
        try:
            self.digest: str = summary["digest"]
            self._rows = map_batch(check_columns(path, folder, self.digest))
        except ValueError as error:
            raise ValueError(
                f"'{path}': {error}; run python -m data_prep.duplicates again, with this output"
            ) from error

    def find(self, keys: Sequence[str]) -> list[Copy | None]:
        """Finds the entry of each key; None for pairs that are no duplicates."""
        hashes, known = hash_texts(keys), self._rows["hash"].to_numpy()
        rows = np.searchsorted(known, hashes)
        return [
            self._read(row) if row < len(known) and known[row] == wanted else None
            for row, wanted in zip(rows.tolist(), hashes, strict=True)
        ]

    def _read(self, row: int) -> Copy:
        kind, *others = (self._rows[name][row].as_py() for name in Copy._fields)
        return Copy(KINDS[kind], *others)
