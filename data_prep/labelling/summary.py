"""Index, statistics and report of a complete folder of labels.

The report consists of `report.html`, a single file without links, the training curves as an image,
and the metrics as text. Its numbers come from `heads.json`, its images from the labelled shards.
"""

from __future__ import annotations

import collections
import io
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates.rows import hash_texts
from data_prep.jobs import shards
from data_prep.jobs.failures import Survey
from data_prep.labelling.examples import is_held_out
from data_prep.labelling.labels import write_labels_index
from data_prep.labelling.tasks import LabelTask
from data_prep.sources import typed_texts
from data_prep.teachers.base import TeacherInfo
from diht_jax.data.index import is_indexable, update_index
from diht_jax.input.transforms import ImageError, decode_rgb
from diht_jax.pages.render import render, thumbnail
from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.formats import open_source
from diht_jax.records.labels.clip_embeddings import ClipFacts
from diht_jax.records.labels.shards import CLIP_EMBEDDINGS, open_labels
from diht_jax.records.schema import Record
from diht_jax.records.train_data import LABELS, relative_input
from diht_jax.records.vocabulary import KINDS, Vocabulary
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote
from diht_jax.terminal import format_table, print_escaped

PAGE = "report.html"
CURVES = "curves.png"
_THUMBNAIL = 192  # px
_FEW_HELD_OUT = 100  # images; the report warns if there are fewer
_SHOWN = 6  # concepts per kind and image
_LISTED = 40  # concepts from the head and from the tail of a vocabulary
_MAX_TRIES = 20  # records read per image of the report until enough are held out
_WORD = re.compile(r"[^\W_]+(?:-[^\W_]+)*")


def summarize(
    config: ml_collections.ConfigDict,
    found: Survey[LabelTask],
    vocabulary: Vocabulary,
    heads: dict[str, Any],
    teacher: TeacherInfo,
) -> None:
    """Writes the files that describe the whole folder, and prints the metrics.

    `found` contains the finished labelling tasks, and `heads` the contents of `heads.json`.
    """
    folder = config.output
    tasks, done = _read_done(found)
    counts = [stats["counts"] for stats in done]
    records, num_bytes = (_add_up(done, name) for name in ("records", "bytes"))
    missing = sum((collections.Counter(c["missing"]) for c in counts), collections.Counter())
    added_bytes = sum(count["added_bytes"] for count in counts) if config.merge else num_bytes
    facts = {
        "config": {k: v for k, v in config.to_dict().items() if k not in ("num_workers", "ray")},
        "shards": len(done),
        "records": records,
        "labelled": sum(count["labelled"] for count in counts),
        "unlabelled": dict(sorted(missing.items())),
        "added_bytes_per_record": added_bytes / max(1, records),
        "vocabulary": vocabulary.describe(),
        "teacher": teacher.identity,
        "licence": teacher.licence,
    }
    if found.failed:
        facts["failed"] = found.failed
    if config.merge:
        if all(is_indexable(task.output) for task in tasks):
            update_index(folder, vocabulary=vocabulary.describe())
        hashes = ", ".join(f"{part.kind} {part.hash}" for part in vocabulary)
        licence = f" Licence of the labels: {teacher.licence}." if teacher.licence else ""
        write_dataset_info(
            folder,
            dataset=config.dataset_name,
            split=config.split,
            shard_lengths=[stats["output"]["records"] for stats in done],
            num_bytes=num_bytes,
            image_formats={name for count in counts for name in count["image_formats"]},
            with_concepts=True,
            description=f"Image-text pairs of {config.input} with concepts, by data_prep.label; "
            f"vocabulary: {hashes}.{licence}",
            file_format=config.output_format,
        )
    else:
        write_labels_index(
            files.join(folder, LABELS),
            done,
            found.failed_tasks,
            _relative_inputs(config),
            vocabulary=vocabulary.describe(),
        )
    files.write_object(files.join(folder, shards.MERGED_STATS), facts, with_checksum=True)
    write_report(folder, facts, heads, vocabulary, tasks)
    for warning in find_warnings(heads):
        logging.warning("%s", warning)
    print_escaped(format_metrics(heads))
    print_escaped(
        f"{facts['labelled']:,} of {records:,} images labelled in {len(done)} shards, "
        f"{facts['added_bytes_per_record']:.0f} bytes each: {folder}; look at "
        f"{folder}/{PAGE}"
    )
    for reason, count in sorted(missing.items()):
        print_escaped(f"without labels: {count:,} ({reason})")


def summarize_clips(
    config: ml_collections.ConfigDict, found: Survey[LabelTask], facts: ClipFacts
) -> None:
    """Writes the index of the CLIP embeddings, and prints a summary."""
    _, done = _read_done(found)
    where = files.join(config.output, CLIP_EMBEDDINGS)
    records = write_labels_index(
        where, done, found.failed_tasks, _relative_inputs(config), facts=facts.describe()
    )
    embedded = sum(stats["counts"]["embedded"] for stats in done)
    names = ", ".join(teacher.name for teacher in facts.teachers)
    print_escaped(
        f"{embedded:,} of {records:,} pairs embedded by {names}, "
        f"{_add_up(done, 'bytes') / max(1, records):,.0f} bytes each: {where}"
    )


def _read_done(found: Survey[LabelTask]) -> tuple[list[LabelTask], list[dict[str, Any]]]:
    """Returns the finished tasks and their statistics."""
    tasks = [task for task, _ in found.parts]
    return tasks, [stats for _, stats, _ in shards.check_all(tasks) if stats is not None]


def _add_up(done: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(stats["output"][name] for stats in done)


def _relative_inputs(config: ml_collections.ConfigDict) -> list[str]:
    return [relative_input(path, config.output) for path in typed_texts(config.input)]


def write_report(
    folder: str,
    summary: dict[str, Any],
    heads: dict[str, Any],
    vocabulary: Vocabulary,
    labelled: Sequence[LabelTask],
) -> None:
    """Writes `report.html` and `curves.png`.

    `summary` has the contents of the folder's `stats.json`, and `heads` those of `heads.json`.
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
    """Returns reasons to doubt the recalls, as sentences for the page and the log.

    `heads` has the contents of `heads.json`.
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
    """Formats the recalls of the heads and the frequency baseline, in percent, as a table."""
    header = ("", "", "own concepts: R@1", "R@5", "R@10", "per concept: R@1", "R@5", "R@10")
    title = f"{_describe_heads(heads)}\n" if heads["loaded_from"] else ""
    return title + format_table(header, _metric_rows(heads), "llrrrrrr", rule=False)


def draw_curves(heads: dict[str, Any]) -> bytes | None:
    """Draws loss and recall of each head as a PNG; returns None if no head was trained."""
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
    """Returns kind and result of each head, objects first."""
    return [(kind, heads["heads"][kind]) for kind in KINDS if kind in heads["heads"]]


def _metric_rows(heads: dict[str, Any]) -> list[tuple[str, ...]]:
    """Returns rows of kind, name and recalls in percent, for each head and its baseline."""
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
    where = folder if is_remote(folder) else os.path.abspath(folder)
    text = (
        f"{summary['labelled']:,} of {summary['records']:,} images in {summary['shards']} shards "
        f"of {where}, from {summary['config']['input']}. Teacher: {teacher}. "
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
    """Selects random records, held-out ones first, in the order of the shards."""
    if config["merge"]:
        source, labels = open_source(folder), None
    else:
        source = open_source([task.source.path for task in labelled])
        labels = open_labels(folder, source, "config.output")
    wanted = min(config["report_images"], len(source))
    order = np.random.default_rng(config["seed"]).permutation(len(source))
    held_out, others = [], []
    for index in order[: wanted * _MAX_TRIES].tolist():
        hashes = hash_texts([source.decode(source[index]).key])
        is_new = is_held_out(hashes, config["heads"]["held_out"], config["seed"])[0]
        (held_out if is_new else others).append(index)
        if len(held_out) == wanted:
            break
    chosen = sorted((held_out + others)[:wanted])
    records = {index: source.decode(source[index]) for index in chosen}
    return [record if labels is None else labels.join(record, i) for i, record in records.items()]


def describe_card(record: Record, vocabulary: Vocabulary) -> dict[str, Any]:
    """Describes an image of the page: the picture, its caption and its concepts.

    Each concept has its probability, and whether the caption names it.
    """
    # Pads the words with spaces, which also finds concepts of several words.
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
