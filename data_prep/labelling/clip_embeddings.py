"""Embeddings of CLIP teachers: one file beside each shard, joined by training as labels are.

What lies in them belongs in `diht_jax.records.labels.clip_embeddings`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.jobs import fingerprint, shards
from data_prep.jobs.crash_search import WorkRecord
from data_prep.jobs.engine import Report
from data_prep.jobs.failures import Survey
from data_prep.labelling.embeddings import embed_surviving, read_shard
from data_prep.labelling.plan import identify_shards
from data_prep.labelling.shard import LabelTask, identify_shard
from data_prep.teachers.clip import open_clip_teachers
from diht_jax.records.labels.clip_embeddings import CLIP_EMBEDDINGS, Manifest, quantize
from diht_jax.records.labels.files import SUFFIX, LabelFile, encode_rows
from diht_jax.storage import files

_FORMAT_VERSION = 1


def plan_tasks(
    tasks: Sequence[shards.ShardTask], folder: str, manifest: Manifest
) -> list[LabelTask]:
    """The task of every shard.

    Args:
        tasks: of `plan.plan_shards`.
        folder: of the output.
        manifest: of the teachers, without files.
    """
    settings = {"format_version": _FORMAT_VERSION, "dtype": manifest.dtype, **manifest.meaning}
    config_hash = shards.hash_config(settings)
    where = files.join(folder, CLIP_EMBEDDINGS.folder)
    files.make_folder(where)
    return [
        LabelTask(
            source=task.source,
            output=files.join(where, f"{os.path.basename(task.output)}{SUFFIX}"),
            config_hash=config_hash,
            shard=shard,
        )
        for task, shard in zip(tasks, identify_shards(tasks), strict=True)
    ]


def embed_shard(
    task: LabelTask,
    report: Report,
    *,
    teachers: ml_collections.ConfigDict,
    manifest: Manifest,
) -> dict[str, Any]:
    """Embeds the views and captions of one shard and writes its file.

    Args:
        task: of `plan_tasks`.
        report: called with the number of records that are done.
        teachers: config section of `teachers.clip.default_config`.
        manifest: of these teachers.

    Returns:
        The statistics, as they lie beside the file.

    Raises:
        ValueError: a damaged shard, or values that are not finite.
    """
    files.remove(task.stats_path)
    source = fingerprint.describe(task.source, task.identity)
    shard = identify_shard(task)
    rows = np.zeros(shard[1], manifest.row_dtype)
    teacher, missing, position = open_clip_teachers(teachers), {}, 0
    with WorkRecord(task.output, task.search) as work:
        for results in embed_surviving(
            read_shard(task.source), teacher, teachers.batch_size, task.search, work
        ):
            for result in results:
                if isinstance(result, str):
                    missing[result] = missing.get(result, 0) + 1
                else:
                    _fill(rows[position], result, manifest)
                position += 1
            report(len(results))
    if position != len(rows):
        raise ValueError(f"{task.source}: {position} records, expected {len(rows)}")
    file = _write(task, shard, rows, manifest)
    counts = {
        "embedded": int(rows["embedded"].sum()),
        "missing": dict(sorted(missing.items())),
        "label_file": file._asdict(),
    }
    return shards.finish_task(task, source, counts, len(rows))


def write_manifest(found: Survey, folder: str, manifest: Manifest) -> None:
    """Lists the files of all shards, and prints what they hold.

    Args:
        found: the tasks of `plan_tasks`; shards that have failed get files without embeddings.
        folder: of the output.
        manifest: of the teachers.
    """
    done = [stats for _, stats, _ in shards.check_all([task for task, _ in found.parts])]
    listed = [LabelFile(**stats["counts"]["label_file"]) for stats in done]
    for task in found.failed_tasks:
        try:
            shard = identify_shard(task)
            nothing = np.zeros(shard[1], manifest.row_dtype)
            listed.append(_write(task, shard, nothing, manifest))
        except ValueError as error:
            logging.warning("%s: it cannot be trained on (%s)", task.source, error)
    path = files.join(folder, CLIP_EMBEDDINGS.manifest)
    files.write_bytes(path, dataclasses.replace(manifest, files=tuple(listed)).encode())
    embedded = sum(stats["counts"]["embedded"] for stats in done)
    print(
        f"{embedded:,} of {sum(file.records for file in listed):,} pairs embedded by "
        f"{', '.join(teacher.name for teacher in manifest.teachers)}, "
        f"{manifest.row_dtype.itemsize:,} bytes each: {path}"
    )


def _fill(row: np.void, vectors: np.ndarray, manifest: Manifest) -> None:
    """Writes the [views + 1, D] of a record into its row, each teacher by itself."""
    start = 0
    for teacher in manifest.teachers:
        columns = slice(start, start + teacher.width)
        stored = quantize(vectors[:, columns], manifest.dtype)
        row["image_emb"][:, columns], row["text_emb"][columns] = stored[:-1], stored[-1]
        start += teacher.width
    row["embedded"] = 1


def _write(
    task: LabelTask, shard: tuple[str, int, int, str], rows: np.ndarray, manifest: Manifest
) -> LabelFile:
    name = os.path.basename(task.output)
    data, file = encode_rows(name, shard, rows, manifest.meaning, "clip_embeddings")
    files.write_bytes(task.output, data)
    return file
