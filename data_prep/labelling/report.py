"""The report of a labelled folder: a page, the training curves as a picture, the metrics as text.

`report.html` is one file without links to others. Numbers come from `heads.json`, images from the
labelled shards.
"""

from __future__ import annotations

import functools
import html
import io
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from data_prep.jobs.shards import ShardTask
from data_prep.labelling.embeddings import hash_key, load_keys
from data_prep.labelling.examples import is_held_out
from data_prep.reports.html import data_uri, render_bar, render_page
from diht_jax.input.decode import ImageError, decode_rgb
from diht_jax.records.formats.registry import open_source
from diht_jax.records.labels.rows import decode_joined, open_labels
from diht_jax.records.schema import Record
from diht_jax.records.vocabulary import KINDS, ConceptList, Vocabulary
from diht_jax.storage import files

PAGE = "report.html"
CURVES = "curves.png"

_THUMBNAIL = 192  # px
_SHOWN = 6  # concepts of a kind under an image
_LISTED = 40  # concepts at the head and at the tail of a vocabulary
_MAX_TRIES = 20  # records looked at for each image of the page, until enough are held out

_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")

_STYLE = """
.licence { background: #fff8c5; padding: 8px 12px; }
.card img { display: block; height: 150px; max-width: 100%; object-fit: contain; }
.card td { padding-right: 6px; } .concepts { display: flex; gap: 8px; }
.own { font-weight: 600; color: #1a7f37; }
ol, ul { columns: 220px; padding-left: 22px; font-size: 13px; }
"""


def write_report(
    folder: str,
    summary: dict[str, Any],
    heads: dict[str, Any],
    vocabulary: Vocabulary,
    embedded: Sequence[ShardTask],
) -> None:
    """Writes `report.html` and `curves.png`.

    Args:
        folder: of the labels, or of the labelled shards.
        summary: what `stats.json` of the folder holds.
        heads: what `heads.json` holds.
        vocabulary: of the labels.
        embedded: the embedding task of every labelled shard.
    """
    curves = draw_curves(heads)
    if curves:
        files.write_bytes(files.join(folder, CURVES), curves)
    records = _choose_records(folder, summary["config"], embedded)
    parts = [
        f"<h1>Concept labels</h1><p>{_describe_run(folder, summary)}</p>",
        _licence(summary["licence"]),
        f"<h2>{_describe_heads(heads)}</h2>{_metrics_table(heads)}",
        f'<p><img src="{data_uri(curves, "png")}" width="1000" alt="training curves"></p>'
        if curves
        else "",
        "<h2>Images</h2><p class=note>Random images that no head was trained on, where there are "
        "enough; <span class=own>green</span>: a word of the caption itself. The bar is the "
        "probability among the kept concepts.</p>",
        f'<div class="images">{"".join(_card(record, vocabulary) for record in records)}</div>',
        *(_vocabulary_section(part) for part in vocabulary if len(part)),
        *(_ranking_section(kind, result) for kind, result in _results(heads)),
    ]
    page = render_page("Concept labels", parts, _STYLE)
    files.write_bytes(files.join(folder, PAGE), page.encode())


def format_metrics(heads: dict[str, Any]) -> str:
    """Recalls of the heads and of the frequency baseline, in percent, as a table."""
    rows = [("", "", "own concepts: R@1", "R@5", "R@10", "per concept: R@1", "R@5", "R@10")]
    for kind, name, values in _metric_rows(heads):
        rows.append((kind, name, *(f"{100 * value:.1f}" for value in values)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    title = f"{_describe_heads(heads)}\n" if heads["loaded_from"] else ""
    return title + "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def draw_curves(heads: dict[str, Any]) -> bytes | None:
    """A PNG with loss and recall of each head; None where none was trained."""
    results = _results(heads)
    if not results:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2 * len(results)), dpi=120, layout="constrained")
    axes = figure.subplots(len(results), 2, squeeze=False)
    for (kind, result), (loss, recall) in zip(results, axes, strict=True):
        curve = result["curve"]
        steps = [entry["step"] for entry in curve]
        loss.plot(steps, [entry["held_out_loss"] for entry in curve], label="held out")
        loss.plot(
            steps[1:],
            [entry["train_loss"] for entry in curve[1:]],
            label="training (rare concepts up-sampled)",
        )
        loss.set(title=f"{kind}: loss", xlabel="step")
        loss.legend(frameon=False)
        recall.plot(steps, [entry["recall_at_10"] for entry in curve], label="head, held out")
        recall.axhline(
            result["baseline"]["recall_at_10"], color="grey", ls="--", label="frequency only"
        )
        recall.set(title=f"{kind}: recall@10 of the caption's own", xlabel="step", ylim=(0, 1.02))
        recall.legend(frameon=False)
        for axis in (loss, recall):
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _results(heads: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Kind and result of each head, objects first."""
    return [(kind, heads["heads"][kind]) for kind in KINDS if kind in heads["heads"]]


def _metric_rows(heads: dict[str, Any]) -> Iterable[tuple[str, str, list[float]]]:
    for kind, result in _results(heads):
        for name, key in (("head", "metrics"), ("frequency only", "baseline")):
            values = result[key]
            names = [f"{prefix}recall_at_{k}" for prefix in ("", "concept_") for k in (1, 5, 10)]
            yield kind if name == "head" else "", name, [values[n] for n in names]


def _describe_run(folder: str, summary: dict[str, Any]) -> str:
    sizes = ", ".join(
        f"{part['size']:,} {kind} ({part['hash']})" for kind, part in summary["vocabulary"].items()
    )
    teacher = ", ".join(
        f"{name} {value}" for name, value in summary["teacher"].items() if isinstance(value, str)
    )
    text = (
        f"{summary['labelled']:,} of {summary['records']:,} images in {summary['shards']} shards "
        f"of {os.path.abspath(folder)}, from {summary['config']['input']}. Teacher: {teacher}. "
        f"Vocabulary: {sizes}. Labels take {summary['added_bytes_per_record']:.0f} bytes a record."
    )
    for reason, count in sorted(summary["unlabelled"].items()):
        text += f" Without labels: {count:,} ({reason})."
    return html.escape(text)


def _describe_heads(heads: dict[str, Any]) -> str:
    folder = heads["loaded_from"]
    return f"Heads, trained in {html.escape(folder)}" if folder else "Heads"


def _licence(licence: str | None) -> str:
    if not licence:
        return ""
    return f'<p class="licence">Licence of the teacher and of these labels: {html.escape(licence)}'


def _metrics_table(heads: dict[str, Any]) -> str:
    header = (
        "<tr><th></th><th></th><th class=n>R@1</th><th class=n>R@5</th><th class=n>R@10</th>"
        "<th class=n>per concept: R@1</th><th class=n>R@5</th><th class=n>R@10</th></tr>"
    )
    rows = ""
    for kind, name, values in _metric_rows(heads):
        cells = "".join(f"<td class=n>{100 * value:.1f}</td>" for value in values)
        rows += f"<tr><td>{kind}</td><td>{name}</td>{cells}</tr>"
    images = "; ".join(
        f"{kind}: {result['images']['train']:,} for training, {result['images']['held_out']:,} "
        "held out"
        for kind, result in _results(heads)
    )
    return (
        f"<table>{header}{rows}</table><p class=note>Percent, on held-out images. R@k: share of "
        "the concepts of an image's own caption among the first k predictions, mean over images; "
        f"per concept: the same, mean over concepts. Images with a concept: {images}.</p>"
    )


def _choose_records(
    folder: str, config: dict[str, Any], embedded: Sequence[ShardTask]
) -> list[Record]:
    """Random records, held-out ones first, in the order of the shards; no others are read."""
    if config["merge"]:
        source, labels = open_source(folder), None
    else:
        source = open_source([task.source.path for task in embedded])
        labels = open_labels(folder, source)
    wanted = min(config["report_images"], len(source))
    order = np.random.default_rng(config["seed"]).permutation(len(source))
    files_of = dict(zip(source.paths, (task.output for task in embedded), strict=True))
    lengths = dict(zip(source.paths, source.shard_lengths.tolist(), strict=True))

    @functools.cache
    def find_keys(path: str) -> np.ndarray | None:
        exists = files.exists(files_of[path])
        return load_keys(files_of[path], lengths[path])[1] if exists else None

    held_out, others = [], []
    for index in order[: wanted * _MAX_TRIES].tolist():
        path, number = source.locate(index)
        hashes = find_keys(path)
        if hashes is None:  # the embeddings may be deleted once the labels are made
            hashes, number = np.array([hash_key(source.decode(source[index]).key)], np.uint64), 0
        is_new = is_held_out(
            hashes[number : number + 1], config["heads"]["held_out"], config["seed"]
        )[0]
        (held_out if is_new else others).append(index)
        if len(held_out) == wanted:
            break
    chosen = sorted((held_out + others)[:wanted])
    if labels is None:
        return [source.decode(source[index]) for index in chosen]
    return [decode_joined(source.decode, (source[index], labels[index])) for index in chosen]


def _card(record: Record, vocabulary: Vocabulary) -> str:
    # Words between spaces, so that a concept of several words is found as well.
    words = f" {' '.join(_WORD.findall(record.caption.lower()))} "
    tables = "".join(
        _concept_table(part, ids, probs, words)
        for part, ids, probs in (
            (vocabulary.objects, record.object_ids, record.object_probs),
            (vocabulary.attributes, record.attribute_ids, record.attribute_probs),
        )
        if ids is not None and len(ids)
    )
    return (
        f'<div class="card">{_thumbnail(record)}<p>{html.escape(record.caption[:200])}</p>'
        f'<div class="concepts">{tables or "<i>no labels</i>"}</div></div>'
    )


def _concept_table(part: ConceptList, ids: np.ndarray, probs: np.ndarray, words: str) -> str:
    rows = ""
    for concept, prob in zip(ids[:_SHOWN].tolist(), probs[:_SHOWN].tolist(), strict=True):
        name = part.names[concept]
        css = ' class="own"' if f" {name} " in words else ""
        rows += (
            f"<tr><td{css}>{html.escape(name)}</td><td class=n>{100 * prob:.0f}%</td>"
            f"<td>{render_bar(prob, 24)}</td></tr>"
        )
    return f"<table>{rows}</table>"


def _thumbnail(record: Record) -> str:
    try:
        image = decode_rgb(record.image)
    except ImageError as error:
        return f"<i>no picture: {html.escape(error.reason)}</i>"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f'<img src="{data_uri(buffer.getvalue(), "jpeg")}" alt="{html.escape(record.key)}">'


def _vocabulary_section(part: ConceptList) -> str:
    entries = [
        f'<li value="{i}">{html.escape(name)} <span class=note>{count:,}</span></li>'
        for i, (name, count) in enumerate(zip(part.names, part.counts, strict=True))
    ]
    head, tail = entries[:_LISTED], entries[_LISTED:][-_LISTED:]
    text = f"<h2>Vocabulary: {len(part):,} {part.kind}</h2><p class=note>Id, concept, and pairs "
    text += f"that mention it. The most frequent:</p><ol start=0>{''.join(head)}</ol>"
    return text + (f"<p class=note>The rarest:</p><ol>{''.join(tail)}</ol>" if tail else "")


def _ranking_section(kind: str, result: dict[str, Any]) -> str:
    if not result["best"]:
        return ""
    rank = result["ranked_by"].rpartition("_")[2]
    lists = "".join(
        f"<div><p class=note>{title}</p>{_ranking_table(result[name])}</div>"
        for title, name in (("Best", "best"), ("Worst", "worst"))
    )
    return (
        f"<h2>Best and worst {kind}</h2><p class=note>By recall@{rank} on the held-out images "
        "whose caption names the concept, at least five.</p>"
        f'<div class="columns">{lists}</div>'
    )


def _ranking_table(entries: Sequence[dict[str, Any]]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(entry['concept'])}</td><td class=n>{100 * entry['recall']:.0f}%</td>"
        f"<td class=n>{entry['images']}</td></tr>"
        for entry in entries
    )
    header = "<tr><th>concept</th><th class=n>recall</th><th class=n>images</th></tr>"
    return f"<table>{header}{rows}</table>"
