"""`report.html`: how many duplicates there are, and pairs of pictures to look at."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from data_prep.duplicates.scan import Rows
from data_prep.duplicates.table import KINDS, random_ranks
from data_prep.duplicates.units import EMBEDDED
from data_prep.reports.html import data_uri, render_bar, render_page, render_table
from data_prep.sources.list import read_pairs
from diht_jax.input.decode import ImageError, decode_rgb
from diht_jax.records.schema import Pair

PAGE = "report.html"

_THUMBNAIL = 200  # px of the longer side
_BINS = 10
_NAMED = 4  # units that failed
_STYLE = """
.pair { display: flex; gap: 8px; } .pair figure { margin: 0; flex: 1; min-width: 0; }
.pair img { max-width: 100%; max-height: 160px; } figcaption { font-size: 12px; }
"""


class Shown(NamedTuple):
    """A pair of pictures on the page.

    Attributes:
        kind: one of `table.KINDS`.
        similarity: their cosine or correlation.
        dropped, alike: their rows.
    """

    kind: str
    similarity: float
    dropped: int
    alike: int


def describe(summary: Mapping[str, Any]) -> str:
    """The counts, as a sentence."""
    pairs = summary["pairs"]

    def share(count: int) -> str:
        return f"{count:,} ({100 * count / max(pairs, 1):.1f}%)"

    text = (
        f"{pairs:,} pairs: {share(summary['exact'])} exact copies, {share(summary['near'])} "
        f"near-duplicates, {share(summary['kept'])} kept; {summary['clusters']:,} clusters"
    )
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


def describe_block(
    found: Mapping[str, np.ndarray], config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """What the page needs of a block of pairs, JSON-able; `merge_blocks` adds it up.

    Args:
        found: the duplicates, as `stages.merge_block` writes them.
        config: of `duplicates.config.default_config`.
    """
    is_near = found["kind"] == 1
    counts, _ = np.histogram(found["similarity"][is_near].clip(max=1), _edges(config))
    shown = {}
    for number, kind in enumerate(KINDS):
        own = np.flatnonzero(found["kind"] == number)
        # A random number of each row, the same whatever lies beside it.
        ranks = random_ranks(found["dropped"][own], config.seed)
        first = own[np.argsort(ranks, kind="stable")[: config.report_pairs]]
        ranks = np.sort(ranks)[: config.report_pairs]
        columns = (found[name][first].tolist() for name in ("similarity", "dropped", "alike"))
        shown[kind] = list(zip(ranks.tolist(), *columns, strict=True))
    return {"histogram": counts.tolist(), "shown": shown}


def merge_blocks(
    blocks: Sequence[Mapping[str, Any]], config: ml_collections.ConfigDict
) -> tuple[np.ndarray, list[Shown]]:
    """Adds up what `describe_block` states of all blocks.

    Returns:
        histogram: int64, near-duplicates by similarity.
        shown: pairs for the page, at random, a quarter of them exact copies at most; the least
            alike first.
    """
    histogram = np.sum([block["histogram"] for block in blocks], axis=0)
    exact, near = (
        sorted(tuple(row) for block in blocks for row in block["shown"][kind])[
            : config.report_pairs
        ]
        for kind in KINDS
    )
    exact = exact[: max(config.report_pairs // 4, config.report_pairs - len(near))]
    near = near[: config.report_pairs - len(exact)]
    shown = [
        Shown(kind, *row[1:])
        for kind, rows in zip(KINDS, (exact, near), strict=True)
        for row in rows
    ]
    return histogram, sorted(shown, key=lambda pair: (pair.similarity, pair.dropped))


def _edges(config: ml_collections.ConfigDict) -> np.ndarray:
    """Of the bins of the histogram; what is below the first one, by rounding, is not shown."""
    least = config.verify.correlation
    least = config.threshold if least is None else least
    return np.linspace(min(least, 0.99), 1, _BINS + 1)


def render(
    summary: Mapping[str, Any],
    blocks: Sequence[Mapping[str, Any]],
    sizes: np.ndarray,
    rows: Rows,
    config: ml_collections.ConfigDict,
) -> str:
    """The page, as text.

    Args:
        summary: of the job.
        blocks: of `describe_block`.
        sizes: int64 [k], rows of each cluster.
        rows: all of the input.
        config: of the job.
    """
    histogram, shown = merge_blocks(blocks, config)
    measure = "correlation" if summary["verified"] else "cosine"
    parts = [f"<h1>Duplicates</h1><p>{html.escape(describe(summary))}.</p>"]
    if histogram.any():
        table = _render_histogram(histogram, _edges(config), measure)
        parts.append(f"<h2>Near-duplicates by {measure}</h2>{table}")
    if len(sizes):
        parts.append(
            f"<p class=note>Rows of a cluster: {sizes.min():,} to {sizes.max():,}, median "
            f"{int(np.median(sizes)):,}. Of alike pictures the {html.escape(summary['keep'])} one "
            f"stays; threshold {summary['threshold']}.</p>"
        )
    pictures = _read_pictures(shown, rows)
    cards = "".join(_card(pair, pictures, measure) for pair in shown)
    parts.append(
        "<h2>Pairs to look at</h2><p class=note>Left: dropped. Right: the picture that it is most "
        f'alike.</p><div class="images">{cards}</div>'
    )
    return render_page("Duplicates", parts, _STYLE)


def _render_histogram(counts: np.ndarray, edges: np.ndarray, measure: str) -> str:
    rows = [
        [f"{low:.3f} to {high:.3f}", f"{count:,}", render_bar(count / counts.max(), 160)]
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]
    return render_table([measure, "pairs", ""], rows, bars=1)


def _card(pair: Shown, pictures: Mapping[int, tuple[str, str, bytes | None]], measure: str) -> str:
    figures = "".join(_figure(*pictures[row]) for row in (pair.dropped, pair.alike))
    title = "equal bytes" if pair.kind == "exact" else f"{measure} {pair.similarity:.3f}"
    return f'<div class="card"><p><b>{title}</b></p><div class="pair">{figures}</div></div>'


def _figure(key: str, caption: str, picture: bytes | None) -> str:
    image = (
        f'<img src="{data_uri(picture, "jpeg")}" alt="{html.escape(key)}">'
        if picture
        else "<i>no picture</i>"
    )
    words = f"{html.escape(caption)}<br><span class=note>{html.escape(key)}</span>"
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def _read_pictures(shown: Sequence[Shown], rows: Rows) -> dict[int, tuple[str, str, bytes | None]]:
    """Row -> key, caption and thumbnail; reads the units that they lie in."""
    wanted = np.unique([row for pair in shown for row in (pair.dropped, pair.alike)])
    wanted = wanted.astype(np.int64)
    found = {
        int(row): (key, "", None)
        for row, key in zip(wanted, rows.keys(wanted).to_pylist(), strict=True)
    }
    units = np.searchsorted(rows.starts, wanted, side="right") - 1
    for unit in np.unique(units):
        source, start = rows.units[unit].source, rows.starts[unit]
        if source.kind == EMBEDDED:
            continue
        own = {int(row - start) for row in wanted[units == unit]}
        pairs = (entry for entry in read_pairs(source) if isinstance(entry, Pair))
        for number, pair in zip(range(max(own) + 1), pairs, strict=False):
            if number in own:
                found[int(start) + number] = pair.key, pair.caption, _shrink(pair.image)
    return found


def _shrink(data: bytes) -> bytes | None:
    try:
        image = decode_rgb(data)
    except ImageError:
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()
