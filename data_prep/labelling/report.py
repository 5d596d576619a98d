"""The report of a labelled folder: a page, the training curves as a picture, the metrics as text.

`report.html` is one file without links to others. Numbers come from `heads.json`, images from the
labelled shards.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_prep.labelling.embeddings import hash_keys
from data_prep.labelling.examples import is_held_out
from data_prep.labelling.tasks import LabelTask
from diht_jax.input.transforms import ImageError, decode_rgb
from diht_jax.pages.render import render, thumbnail
from diht_jax.records.formats import open_source
from diht_jax.records.labels.shards import open_labels
from diht_jax.records.schema import Record
from diht_jax.records.vocabulary import KINDS, Vocabulary
from diht_jax.storage import files

PAGE = "report.html"
CURVES = "curves.png"

_THUMBNAIL = 192  # px
_FEW_HELD_OUT = 100  # images; of fewer the page says so
_SHOWN = 6  # concepts of a kind under an image
_LISTED = 40  # concepts at the head and at the tail of a vocabulary
_MAX_TRIES = 20  # records looked at for each image of the page, until enough are held out

_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


def write_report(
    folder: str,
    summary: dict[str, Any],
    heads: dict[str, Any],
    vocabulary: Vocabulary,
    labelled: Sequence[LabelTask],
) -> None:
    """Writes `report.html` and `curves.png`.

    `summary` is what `stats.json` of the folder holds, and `heads` what `heads.json` holds.
    """
    curves = draw_curves(heads)
    if curves:
        files.write_bytes(files.join(folder, CURVES), curves)
    ranks = ("R@1", "R@5", "R@10")
    render(
        "labels.html",
        files.join(folder, PAGE),
        title="Concept labels",
        run=_describe_run(folder, summary),
        licence=summary["licence"],
        heads_title=_describe_heads(heads),
        warnings=find_warnings(heads),
        metrics_header=("", "", *ranks, "per concept: R@1", *ranks[1:]),
        metrics=_metric_rows(heads),
        num_images="; ".join(
            f"{kind}: {result['images']['train']:,} for training, "
            f"{result['images']['held_out']:,} held out"
            for kind, result in _results(heads)
        ),
        curves=curves,
        cards=[
            describe_card(record, vocabulary)
            for record in _choose_records(folder, summary["config"], labelled)
        ],
        vocabulary=[part for part in vocabulary if len(part)],
        listed=_LISTED,
        rankings=[(kind, result) for kind, result in _results(heads) if result["best"]],
    )


def find_warnings(heads: dict[str, Any]) -> list[str]:
    """Limits of the recalls: sentences for the page and the log.

    `heads` is what `heads.json` holds.
    """
    if heads["loaded_from"]:
        return [
            f"The heads were trained in {heads['loaded_from']}: the recalls are those of held-out "
            "images there. How right the labels of these images are was not measured."
        ]
    warnings, images = [], heads.get("images")
    if images and 2 * images["named"] < images["all"]:
        warnings.append(
            f"Only {images['named']:,} of {images['all']:,} images name a concept of the "
            "vocabulary in their captions. The heads learn from these alone, and the recalls are "
            "measured on those of them that are held out, so they are those of images like the "
            "training images; of the others they say nothing. Yet every image gets its nearest "
            "concepts, however far: a flower may become a person. Take more pairs, lower "
            "config.vocabulary.min_count, or load heads that were trained on more "
            "(config.heads.load)."
        )
    for kind, result in _results(heads):
        if (count := result["images"]["held_out"]) < _FEW_HELD_OUT:
            warnings.append(
                f"The recalls of the {kind} are those of {count} held-out images: each counts "
                f"for {100 / count:.1f} points. Take more pairs, or raise config.heads.held_out."
            )
    return warnings


def format_metrics(heads: dict[str, Any]) -> str:
    """Recalls of the heads and of the frequency baseline, in percent, as a table."""
    header = ("", "", "own concepts: R@1", "R@5", "R@10", "per concept: R@1", "R@5", "R@10")
    rows = [header, *_metric_rows(heads)]
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


def _metric_rows(heads: dict[str, Any]) -> list[tuple[str, ...]]:
    """Kind, name and recalls in percent of each head, and of its baseline."""
    names = [f"{prefix}recall_at_{k}" for prefix in ("", "concept_") for k in (1, 5, 10)]
    return [
        (shown, name, *(f"{100 * result[key][each]:.1f}" for each in names))
        for kind, result in _results(heads)
        for shown, name, key in ((kind, "head", "metrics"), ("", "frequency only", "baseline"))
    ]


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
    return text


def _describe_heads(heads: dict[str, Any]) -> str:
    folder = heads["loaded_from"]
    return f"Heads, trained in {folder}" if folder else "Heads"


def _choose_records(
    folder: str, config: dict[str, Any], labelled: Sequence[LabelTask]
) -> list[Record]:
    """Random records, held-out ones first, in the order of the shards."""
    if config["merge"]:
        source, labels = open_source(folder), None
    else:
        source = open_source([task.source.path for task in labelled])
        labels = open_labels(folder, source, "config.output")
    wanted = min(config["report_images"], len(source))
    order = np.random.default_rng(config["seed"]).permutation(len(source))
    held_out, others = [], []
    for index in order[: wanted * _MAX_TRIES].tolist():
        hashes = hash_keys([source.decode(source[index]).key])
        is_new = is_held_out(hashes, config["heads"]["held_out"], config["seed"])[0]
        (held_out if is_new else others).append(index)
        if len(held_out) == wanted:
            break
    chosen = sorted((held_out + others)[:wanted])
    records = {index: source.decode(source[index]) for index in chosen}
    return [record if labels is None else labels.join(record, i) for i, record in records.items()]


def describe_card(record: Record, vocabulary: Vocabulary) -> dict[str, Any]:
    """The card of an image on the page: picture, caption, and its concepts.

    A concept comes with its probability, and whether the caption names it.
    """
    # Words between spaces, so that a concept of several words is found as well.
    words = f" {' '.join(_WORD.findall(record.caption.lower()))} "
    concepts = [
        [
            (part.names[i], prob, f" {part.names[i]} " in words)
            for i, prob in zip(ids[:_SHOWN].tolist(), probs[:_SHOWN].tolist(), strict=True)
        ]
        for part, ids, probs in (
            (vocabulary.objects, record.object_ids, record.object_probs),
            (vocabulary.attributes, record.attribute_ids, record.attribute_probs),
        )
        if ids is not None and probs is not None and len(ids)
    ]
    card = {"key": record.key, "caption": record.caption[:200], "concepts": concepts}
    try:
        return card | {"picture": thumbnail(decode_rgb(record.image), _THUMBNAIL)}
    except ImageError as error:
        return card | {"picture": None, "problem": error.reason}
