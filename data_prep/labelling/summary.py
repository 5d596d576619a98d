"""The files that describe a whole folder of labels, once all of them are there."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.failures import Survey
from data_prep.labelling import report
from data_prep.labelling.labels import write_labels_index
from data_prep.labelling.tasks import LabelTask, input_paths
from data_prep.teachers.base import TeacherInfo
from diht_jax.data.index import is_indexable, update_index
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.labels.clip_embeddings import ClipFacts
from diht_jax.records.labels.shards import CLIP_EMBEDDINGS
from diht_jax.records.train_data import LABELS, relative_input
from diht_jax.records.vocabulary import Vocabulary
from diht_jax.storage import files
from diht_jax.terminal import print_escaped


def remove_summary(folder: str) -> None:
    """Removes the files that describe the whole folder, before a shard of it changes."""
    shards.remove_merged(folder)
    files.remove(files.join(folder, LABELS, INDEX_NAME))


def summarize(
    config: ml_collections.ConfigDict,
    found: Survey[LabelTask],
    vocabulary: Vocabulary,
    heads: dict[str, Any],
    teacher: TeacherInfo,
) -> None:
    """Writes the files that describe the whole folder, and prints the metrics.

    `found` are the labelling tasks that are done, and `heads` is what `heads.json` holds.
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
    report.write_report(folder, facts, heads, vocabulary, tasks)
    for warning in report.find_warnings(heads):
        logging.warning("%s", warning)
    print_escaped(report.format_metrics(heads))
    print_escaped(
        f"{facts['labelled']:,} of {records:,} images labelled in {len(done)} shards, "
        f"{facts['added_bytes_per_record']:.0f} bytes each: {folder}; look at "
        f"{folder}/{report.PAGE}"
    )
    for reason, count in sorted(missing.items()):
        print_escaped(f"without labels: {count:,} ({reason})")


def summarize_clips(
    config: ml_collections.ConfigDict, found: Survey[LabelTask], facts: ClipFacts
) -> None:
    """Writes the index of the embeddings of CLIP teachers, and prints what they are."""
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
    """The tasks that are done, and their statistics."""
    tasks = [task for task, _ in found.parts]
    return tasks, [stats for _, stats, _ in shards.check_all(tasks) if stats is not None]


def _add_up(done: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(stats["output"][name] for stats in done)


def _relative_inputs(config: ml_collections.ConfigDict) -> list[str]:
    return [relative_input(path, config.output) for path in input_paths(config.input)]
