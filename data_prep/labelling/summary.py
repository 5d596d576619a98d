"""The files that describe a whole folder of labels, once all of them are there."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import ml_collections

from data_prep.jobs import shards
from data_prep.jobs.failures import Survey
from data_prep.labelling import report
from data_prep.labelling.labels import write_labels_index
from data_prep.labelling.tasks import LabelTask, input_paths
from data_prep.teachers.base import TeacherInfo
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.labels.clip_embeddings import ClipFacts
from diht_jax.records.labels.shards import CLIP_EMBEDDINGS, LABELS, relative_input
from diht_jax.records.vocabulary import Vocabulary
from diht_jax.storage import files


def remove_summary(folder: str) -> None:
    """Removes the files that describe the whole folder, before a shard of it changes."""
    shards.remove_merged(folder)
    files.remove(files.join(folder, LABELS, INDEX_NAME))


def summarize(
    config: ml_collections.ConfigDict,
    found: Survey,
    folder: str,
    vocabulary: Vocabulary,
    heads: dict[str, Any],
    teacher: TeacherInfo,
) -> None:
    """Writes the files that describe the whole folder, and prints the metrics.

    Args:
        config: of `labelling.config.default_config`.
        found: the labelling tasks that are done, and what failed.
        folder: of the output.
        vocabulary: of the labels.
        heads: what `heads.json` holds.
        teacher: of the embeddings.
    """
    done_tasks = [task for task, _ in found.parts]
    done = [stats for _, stats, _ in shards.check_all(done_tasks)]
    counts = [stats["counts"] for stats in done]
    records = sum(stats["output"]["records"] for stats in done)
    missing = collections.Counter()
    for count in counts:
        missing.update(count["missing"])
    if config.merge:
        added_bytes = sum(count["added_bytes"] for count in counts)
    else:
        added_bytes = sum(stats["output"]["bytes"] for stats in done)
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
        _describe_merged(config, done_tasks, done, folder, vocabulary, teacher)
    else:
        write_labels_index(
            files.join(folder, LABELS),
            done,
            found.failed_tasks,
            _relative_inputs(config, folder),
            vocabulary=vocabulary.describe(),
        )
    files.write_object(files.join(folder, shards.MERGED_STATS), facts)
    report.write_report(folder, facts, heads, vocabulary, done_tasks)
    print(report.format_metrics(heads))
    print(
        f"{facts['labelled']:,} of {records:,} images labelled in {len(done)} shards, "
        f"{facts['added_bytes_per_record']:.0f} bytes each: {folder}; look at "
        f"{folder}/{report.PAGE}"
    )
    for reason, count in sorted(missing.items()):
        print(f"without labels: {count:,} ({reason})")


def summarize_clips(
    config: ml_collections.ConfigDict, found: Survey, folder: str, facts: ClipFacts
) -> None:
    """Writes the index of the embeddings of CLIP teachers, and prints what they are.

    Args:
        config: of `labelling.config.default_config`.
        found: the tasks that are done, and what failed.
        folder: of the output.
        facts: of the teachers.
    """
    done = [stats for _, stats, _ in shards.check_all([task for task, _ in found.parts])]
    where = files.join(folder, CLIP_EMBEDDINGS)
    records = write_labels_index(
        where,
        done,
        found.failed_tasks,
        _relative_inputs(config, folder),
        facts=facts.describe(),
    )
    embedded = sum(stats["counts"]["embedded"] for stats in done)
    names = ", ".join(teacher.name for teacher in facts.teachers)
    num_bytes = sum(stats["output"]["bytes"] for stats in done) / max(1, records)
    print(
        f"{embedded:,} of {records:,} pairs embedded by {names}, {num_bytes:,.0f} bytes each: "
        f"{where}"
    )


def _relative_inputs(config: ml_collections.ConfigDict, folder: str) -> list[str]:
    return [relative_input(path, folder) for path in input_paths(config.input)]


def _describe_merged(
    config: ml_collections.ConfigDict,
    planned: Sequence[LabelTask],
    done: Sequence[dict[str, Any]],
    folder: str,
    vocabulary: Vocabulary,
    teacher: TeacherInfo,
) -> None:
    """Writes the index of merged shards, and their description for TFDS."""
    shards.write_index(folder, [task.output for task in planned], vocabulary.describe())
    hashes = ", ".join(f"{part.kind} {part.hash}" for part in vocabulary)
    licence = f" Licence of the labels: {teacher.licence}." if teacher.licence else ""
    write_dataset_info(
        folder,
        dataset=config.dataset_name,
        split=config.split,
        shard_lengths=[stats["output"]["records"] for stats in done],
        num_bytes=sum(stats["output"]["bytes"] for stats in done),
        image_formats={name for stats in done for name in stats["counts"]["image_formats"]},
        with_concepts=True,
        description=f"Image-text pairs of {config.input} with concepts, by data_prep.label; "
        f"vocabulary: {hashes}.{licence}",
        file_format=config.output_format,
    )
