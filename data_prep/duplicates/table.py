"""Results of the search: a table for lookups by key, and a report with example pairs.

`dropped.arrow` has a row for each dropped pair with a unique key, sorted by a hash of the key. It
is memory-mapped, and shared by all workers of a machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates.rows import Rows, check_columns, hash_texts, map_batch, write_columns
from data_prep.duplicates.scan import EMBEDDED
from data_prep.duplicates.search import Clusters, Found, follow_to_kept
from data_prep.sources import read_pairs
from diht_jax.input.transforms import ImageError, decode_rgb
from diht_jax.pages.render import bar, render, thumbnail
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files

TABLE = "duplicates"
LOOKUP = "dropped.arrow"
SUMMARY = "duplicates.json"  # written last: marks the folder as complete

PAGE = "report.html"
KINDS = ("exact", "near")

_THUMBNAIL = 200  # px of the longer side
_BINS = 10
_NAMED = 4  # failed units named in the report


class Copy(NamedTuple):
    """Entry of a dropped pair.

    Attributes:
        kind: one of `KINDS`.
        similarity: cosine or correlation with the other image; 1 for an exact copy.
        duplicate_of: key of the pair with the other image.
    """

    kind: str
    similarity: float
    duplicate_of: str

    def describe(self) -> str:
        """Returns why the pair is dropped, for people."""
        if self.kind == "exact":
            return f"equal bytes: {self.duplicate_of}"
        return f"similarity {self.similarity:.3f} with {self.duplicate_of}"


def write_tables(rows: Rows, found: Found, clusters: Clusters) -> dict[str, Any]:
    """Writes the table of each unit, and `dropped.arrow`.

    Returns:
        Entries of the summary: "pairs_of_repeated_keys", which a filter by key cannot
        distinguish, and "digest", a hash of `dropped.arrow`.
    """
    import pyarrow
    import pyarrow.parquet

    folder = files.join(rows.output, TABLE)
    files.make_folder(folder)
    dropped = found.dropped()
    kept_keys = rows.take("key", follow_to_kept(dropped, dropped.alike))
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
                "duplicate_of": alike.take(own).cast(pyarrow.string()),
                "other_caption": pyarrow.array(found.other_caption).take(own),
                "kept_key": kept_keys.take(own_dropped).cast(pyarrow.string()),
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
    """Reads `duplicates.json`; returns None if the folder is not complete.

    "inputs" contains `hash_input` of the shards whose pairs are in the table.
    """
    return files.read_object(files.join(folder, SUMMARY))


def hash_input(source: SourceShard) -> str:
    """Returns 16 hexadecimal digits of the name and size of a shard's file."""
    row = [os.path.basename(source.path), source.identity()["size_bytes"]]
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=8).hexdigest()


def is_whole(folder: str, summary: Mapping[str, Any]) -> bool:
    """Returns whether tables and report exist, and `dropped.arrow` matches the summary."""
    try:
        check_columns(files.join(folder, LOOKUP), folder, summary["digest"])
    except ValueError as error:
        logging.warning("%s: the tables are made again (%s: %s)", folder, LOOKUP, error)
        return False
    wanted = summary["units"] - len(summary.get("failed", ()))
    are_all_there = len(files.list_names(files.join(folder, TABLE))) == wanted
    return are_all_there and files.exists(files.join(folder, PAGE))


class Lookup:
    """Lookup of keys in the table of a folder."""

    def __init__(self, folder: str | os.PathLike[str]):
        """Memory-maps the table.

        Raises:
            ValueError: the table is missing or damaged; the message names it.
        """
        folder = os.fspath(folder)
        summary, path = read_summary(folder), files.join(folder, LOOKUP)
        if summary is None:
            raise ValueError(
                f"'{files.join(folder, SUMMARY)}' is missing or damaged: no complete output of "
                "python -m data_prep.duplicates; run that command (again)"
            )
        self.digest: str = summary["digest"]
        try:
            self._rows = map_batch(check_columns(path, folder, self.digest))
        except ValueError as error:
            raise ValueError(
                f"'{path}': {error}; run python -m data_prep.duplicates again, with this output"
            ) from error

    def find(self, keys: Sequence[str]) -> list[Copy | None]:
        """Returns the entry of each key; None for pairs that are not dropped."""
        hashes, known = hash_texts(keys), self._rows["hash"].to_numpy()
        found: list[Copy | None] = []
        for row, wanted in zip(np.searchsorted(known, hashes).tolist(), hashes, strict=True):
            if row < len(known) and known[row] == wanted:
                kind, *others = (self._rows[name][row].as_py() for name in Copy._fields)
                found.append(Copy(KINDS[kind], *others))
            else:
                found.append(None)
        return found


def describe_summary(summary: Mapping[str, Any]) -> str:
    """Formats the counts as a sentence."""
    pairs = summary["pairs"]

    def share(count: int) -> str:
        return f"{count:,} ({100 * count / max(pairs, 1):.1f}%)"

    text = (
        f"{pairs:,} pairs: {share(summary['exact'])} exact copies, {share(summary['near'])} "
        f"near-duplicates, {share(summary['kept'])} kept; {summary['clusters']:,} clusters"
    )
    if marked := summary["kept_other_caption"]:
        text += f"; {share(marked)} of the kept repeat a picture with another caption"
    if summary["without_embedding"]:
        text += f"; {summary['without_embedding']:,} pairs without an embedding are kept"
    if summary["pairs_of_repeated_keys"]:
        text += (
            f"; {summary['pairs_of_repeated_keys']:,} pairs share their key with others: a filter "
            "by keys keeps them"
        )
    if failed := summary.get("failed"):
        names = ", ".join(found["source"] for found in failed[:_NAMED])
        text += f"; {len(failed)} of {summary['units']:,} units failed and are not among them: "
        text += names + (", ..." if len(failed) > _NAMED else "")
    return text


def write_page(
    summary: Mapping[str, Any],
    found: Found,
    sizes: np.ndarray,
    rows: Rows,
    sources: Sequence[SourceShard],
    config: ml_collections.ConfigDict,
) -> None:
    """Writes the report; `sizes` are rows per cluster, and `sources` those of the units."""
    measure = "correlation" if summary["verified"] else "cosine"
    shown = _choose_pairs(found, config)
    pictures = _read_pictures(np.stack([found.rows[shown], found.alike[shown]]), rows, sources)
    cards = []
    for number in shown.tolist():
        title = f"{measure} {found.similarity[number]:.3f}" if found.kind[number] else "equal bytes"
        if found.kind[number] >= len(KINDS):
            title += ", kept for its caption"
        cards.append((title, pictures[found.rows[number]], pictures[found.alike[number]]))
    render(
        "duplicates.html",
        files.join(rows.output, PAGE),
        title="Duplicates",
        summary=summary,
        description=describe_summary(summary),
        measure=measure,
        histogram=_histogram(found, config),
        sizes=[int(sizes.min()), int(sizes.max()), int(np.median(sizes))] if len(sizes) else [],
        cards=cards,
    )


def _choose_pairs(found: Found, config: ml_collections.ConfigDict) -> np.ndarray:
    """Draws random duplicates for the report; returns their positions, least similar first.

    At most a quarter of them are exact copies, unless there are too few others.
    """
    order = np.random.default_rng(config.seed).permutation(len(found.rows))
    is_exact = found.kind[order] == 0
    exact, near = order[is_exact], order[~is_exact]
    exact = exact[: max(config.report_pairs // 4, config.report_pairs - len(near))]
    shown = np.concatenate([exact, near[: config.report_pairs - len(exact)]])
    return shown[np.lexsort((found.rows[shown], found.similarity[shown]))]


def _histogram(found: Found, config: ml_collections.ConfigDict) -> list[list[Any]]:
    """Returns table rows of a histogram of near-duplicates: similarities, count and a bar."""
    least = config.verify.correlation
    least = config.threshold if least is None else least
    edges = np.linspace(min(least, 0.99), 1, _BINS + 1)
    counts, _ = np.histogram(found.similarity[found.kind == 1].clip(max=1), edges)
    if not counts.any():
        return []
    return [
        [f"{low:.3f} to {high:.3f}", f"{count:,}", bar(count / counts.max())]
        for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True)
    ]


def _read_pictures(
    wanted: np.ndarray, rows: Rows, sources: Sequence[SourceShard]
) -> dict[int, tuple[str, str, str | None]]:
    """Returns row -> key, caption and thumbnail; reads the units that contain the rows."""
    wanted = np.unique(wanted)
    found: dict[int, tuple[str, str, str | None]] = {
        int(row): (key, "", None)
        for row, key in zip(wanted, rows.take("key", wanted).to_pylist(), strict=True)
    }
    units = rows.unit_of(wanted)
    for unit in np.unique(units):
        if sources[unit].kind == EMBEDDED:
            continue
        start, last = int(rows.starts[unit]), int(wanted[units == unit].max())
        pairs = (entry for entry in read_pairs(sources[unit]) if isinstance(entry, Pair))
        try:
            for row, pair in zip(range(start, last + 1), pairs, strict=False):
                if row in found and found[row][0] == pair.key:
                    found[row] = pair.key, pair.caption, _shrink(pair.image)
        except (OSError, ValueError) as error:  # may have changed or disappeared since the scan
            logging.warning("%s: the page has not all its pictures (%s)", sources[unit], error)
    return found


def _shrink(data: bytes) -> str | None:
    try:
        return thumbnail(decode_rgb(data), _THUMBNAIL)
    except ImageError:
        return None
