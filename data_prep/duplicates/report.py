"""`report.html`: how many duplicates there are, and pairs of pictures to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates.rows import Rows
from data_prep.duplicates.scan import EMBEDDED
from data_prep.duplicates.search import Found
from data_prep.duplicates.table import KINDS
from data_prep.sources import read_pairs
from diht_jax.input.decode import ImageError, decode_rgb
from diht_jax.pages.render import bar, render, thumbnail
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files

PAGE = "report.html"

_THUMBNAIL = 200  # px of the longer side
_BINS = 10
_NAMED = 4  # units that failed


def describe(summary: Mapping[str, Any]) -> str:
    """The counts, as a sentence."""
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
    """Writes the page; `sizes` are the rows of each cluster, and `sources` those of the units."""
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
        description=describe(summary),
        measure=measure,
        histogram=_histogram(found, config),
        sizes=[int(sizes.min()), int(sizes.max()), int(np.median(sizes))] if len(sizes) else [],
        cards=cards,
    )


def _choose_pairs(found: Found, config: ml_collections.ConfigDict) -> np.ndarray:
    """Positions of the duplicates on the page: at random, the least alike first.

    At most a quarter of them are exact copies, unless there are too few others.
    """
    order = np.random.default_rng(config.seed).permutation(len(found.rows))
    is_exact = found.kind[order] == 0
    exact, near = order[is_exact], order[~is_exact]
    exact = exact[: max(config.report_pairs // 4, config.report_pairs - len(near))]
    shown = np.concatenate([exact, near[: config.report_pairs - len(exact)]])
    return shown[np.lexsort((found.rows[shown], found.similarity[shown]))]


def _histogram(found: Found, config: ml_collections.ConfigDict) -> list[list[Any]]:
    """Rows of a table: similarities of near-duplicates, their number, and a bar."""
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
    """Row -> key, caption and thumbnail; reads the units that the rows belong to."""
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
        except (OSError, ValueError) as error:  # it may have gone or changed since its scan
            logging.warning("%s: the page has not all its pictures (%s)", sources[unit], error)
    return found


def _shrink(data: bytes) -> str | None:
    try:
        return thumbnail(decode_rgb(data), _THUMBNAIL)
    except ImageError:
        return None
