"""What describes a whole folder of labels, once all of them are there."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.failures import Survey
from data_prep.labelling import plan
from data_prep.labelling import report as label_report
from data_prep.labelling.shard import LabelTask, label_file, write_no_labels
from data_prep.teachers.base import TeacherInfo
from diht_jax.records.dataset_info import write_dataset_info
from diht_jax.records.labels.files import MANIFEST, Manifest, relative_input
from diht_jax.records.vocabulary import Vocabulary
from diht_jax.storage import files


def remove_summary(folder: str) -> None:
    """Removes what describes the whole folder, before a shard of it changes."""
    shards.remove_merged(folder)
    files.remove(files.join(folder, MANIFEST))


def summarize(
    config: ml_collections.ConfigDict,
    found: Survey,
    embedded: Mapping[str, shards.ShardTask],
    folder: str,
    vocabulary: Vocabulary,
    heads: dict[str, Any],
    teacher: TeacherInfo,
) -> None:
    """Writes what describes the whole folder, and prints the metrics.

    Args:
        config: of `labelling.config.default_config`.
        found: the tasks of `plan.plan_labels` that are done, and what failed.
        embedded: output of each task -> the task of its embeddings.
        folder: of the output.
        vocabulary: of the labels.
        heads: what `heads.json` holds.
        teacher: of the embeddings.
    """
    tasks = [task for task, _ in found.parts]
    done = [stats for _, stats, _ in shards.check_all(tasks)]
    counts = [stats["counts"] for stats in done]
    records = sum(stats["output"]["records"] for stats in done)
    missing = collections.Counter()
    for task, count in zip(tasks, counts, strict=True):
        missing.update(_missing(count, embedded[task.output]))
    facts = {
        "config": {k: v for k, v in config.to_dict().items() if k not in ("num_workers", "ray")},
        "config_hash": done[0]["config_hash"],
        "shards": len(tasks),
        "records": records,
        "labelled": sum(count["labelled"] for count in counts),
        "unlabelled": dict(sorted(missing.items())),
        "added_bytes_per_record": _added_bytes(config, done) / max(1, records),
        "vocabulary": vocabulary.describe(),
        "teacher": teacher.identity,
        "licence": teacher.licence,
    }
    if found.failed:
        facts["failed"] = found.failed
    if config.merge:
        _describe_shards(config, tasks, done, folder, vocabulary, teacher)
    else:
        _write_manifest(config, done, found.failed_tasks, folder, vocabulary)
    shards.write_json(files.join(folder, shards.MERGED_STATS), facts)
    label_report.write_report(folder, facts, heads, vocabulary, [embedded[t.output] for t in tasks])
    print(label_report.format_metrics(heads))
    print(
        f"{facts['labelled']:,} of {records:,} images labelled in {len(tasks)} shards, "
        f"{facts['added_bytes_per_record']:.0f} bytes each: {folder}; look at "
        f"{folder}/{label_report.PAGE}"
    )
    for reason, count in sorted(missing.items()):
        print(f"without labels: {count:,} ({reason})")


def _missing(counts: Mapping[str, Any], embedding: shards.ShardTask) -> Mapping[str, int]:
    """Why images of a shard have no labels; the labels of before do not state it themselves."""
    if "missing" in counts:
        return counts["missing"]
    return (shards.read_stats(embedding) or {"counts": {"missing": {}}})["counts"]["missing"]


def _added_bytes(config: ml_collections.ConfigDict, done: Sequence[dict[str, Any]]) -> int:
    """Bytes that the labels take."""
    if config.merge:
        return sum(stats["counts"]["added_bytes"] for stats in done)
    return sum(stats["output"]["bytes"] for stats in done)


def _write_manifest(
    config: ml_collections.ConfigDict,
    done: Sequence[dict[str, Any]],
    failed: Sequence[LabelTask],
    folder: str,
    vocabulary: Vocabulary,
) -> None:
    """Lists the files of labels; those of failed shards are without labels."""
    inputs = tuple(relative_input(path, folder) for path in plan.input_paths(config.input))
    listed = [label_file(stats) for stats in done]
    sizes = done[0]["counts"]["label_sizes"]
    for task in failed:
        try:
            listed.append(write_no_labels(task, vocabulary.describe(), sizes))
        except ValueError as error:
            logging.warning("%s: it cannot be trained on (%s)", task.source, error)
    manifest = Manifest(inputs, vocabulary.describe(), tuple(sizes), tuple(listed))
    files.write_bytes(files.join(folder, MANIFEST), manifest.encode())


def _describe_shards(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    done: Sequence[dict[str, Any]],
    folder: str,
    vocabulary: Vocabulary,
    teacher: TeacherInfo,
) -> None:
    """Writes the index of merged shards, and their description for TFDS."""
    shards.write_index(folder, [task.output for task in tasks], vocabulary.describe())
    hashes = ", ".join(f"{part.kind} {part.hash}" for part in vocabulary)
    write_dataset_info(
        folder,
        dataset=config.dataset_name,
        split=config.split,
        shard_lengths=[stats["output"]["records"] for stats in done],
        num_bytes=sum(stats["output"]["bytes"] for stats in done),
        image_formats={name for stats in done for name in stats["counts"]["image_formats"]},
        with_concepts=True,
        description=f"Image-text pairs of {config.input} with concepts, by data_prep.label; "
        f"vocabulary: {hashes}."
        + (f" Licence of the labels: {teacher.licence}." if teacher.licence else ""),
        file_format=config.output_format,
    )
