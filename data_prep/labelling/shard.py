"""The labels of one shard: the heads' likeliest concepts, in a file of their own or in the records.

For a file of their own no record is read: the embeddings are enough. In merged shards, keys, order
and everything else of the records stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import ml_collections
import numpy as np

from data_prep.jobs import fingerprint, shards
from data_prep.jobs.engine import Report
from data_prep.labelling.embeddings import (
    ShardEmbeddings,
    compute_embeddings,
    hash_key,
    load_embeddings,
    read_shard,
)
from data_prep.labelling.heads import Head, load_heads_once
from data_prep.labelling.scratch import Scratch
from diht_jax.readers.registry import SourceShard
from diht_jax.records import schema, vocabulary
from diht_jax.records.fingerprint import fingerprint_records
from diht_jax.records.formats.registry import open_source
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.labels.files import FOLDER, SUFFIX, LabelFile, encode_labels
from diht_jax.records.schema import Record, decode_record
from diht_jax.records.tfrecord import read_records
from diht_jax.storage import files

_REPORT_EVERY = 256
_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float32))


@dataclasses.dataclass(frozen=True)
class LabelTask(shards.ShardTask):
    """A task whose output is a file of labels, or a merged shard.

    Attributes:
        shard: name, records, bytes and digest of what is labelled, as in a `Fingerprint`; None
            where the shard is still to be looked at, and for merged shards.
        embedding: the task of its embeddings.
    """

    shard: tuple[str, int, int, str] | None = None
    embedding: shards.ShardTask | None = None


def label_path(shard: str) -> str:
    """Where the labels of a shard lie.

    Args:
        shard: path of the shard, if it lay in the folder of the output.
    """
    folder, name = os.path.split(shard)
    return files.join(folder, FOLDER, f"{name}{SUFFIX}")


def embed_and_label(
    task: LabelTask,
    report: Report,
    *,
    teacher: ml_collections.ConfigDict,
    dtype: str,
    **heads: Any,
) -> dict[str, Any]:
    """Embeds one shard and labels it; the embeddings are kept, and not read again.

    Args:
        task: a shard, and where its labels go.
        report: called with the number of records that are done.
        teacher: config section of `teachers.registry.default_teacher`.
        dtype: of the embeddings' file.
        **heads: arguments of `write_labels`.

    Returns:
        The statistics.

    Raises:
        ValueError: as of `compute_embeddings` and `write_labels`.
    """
    found = _embed(task, report, teacher=teacher, dtype=dtype)
    return write_labels(task, lambda _: None, found=found, **heads)


def embed_and_merge(
    task: LabelTask,
    report: Report,
    *,
    teacher: ml_collections.ConfigDict,
    dtype: str,
    **heads: Any,
) -> dict[str, Any]:
    """Embeds one shard and writes it again, with labels; the input is read once.

    The heads look at 512 images of a shard at a time, whoever calls them, so that labels do not
    depend on it: the records wait for their labels in a temporary file.

    Args:
        task, report, teacher, dtype: as of `embed_and_label`.
        **heads: arguments of `label_shard`.

    Returns:
        The shard's statistics.

    Raises:
        ValueError: as of `compute_embeddings` and `label_shard`.
    """
    with tempfile.TemporaryDirectory(prefix="diht_label_") as folder:
        copy = os.path.join(folder, "records.tfrecord")
        found = _embed(task, report, teacher=teacher, dtype=dtype, records_copy=copy)
        return label_shard(task, lambda _: None, found=found, records_copy=copy, **heads)


def _embed(task: LabelTask, report: Report, **options: Any) -> ShardEmbeddings:
    """The embeddings of a shard that is labelled at once; options of `compute_embeddings`."""
    for path in (task.stats_path, task.embedding.output + shards.FAILED_SUFFIX):
        files.remove(path)
    embedding = dataclasses.replace(task.embedding, search=task.search)
    return compute_embeddings(embedding, report, record_beside=task.output, **options)


def write_labels(
    task: LabelTask,
    report: Report,
    *,
    heads_folder: str,
    weights_hash: str,
    top_k: int,
    described: dict[str, Any],
    found: ShardEmbeddings | None = None,
    scratch: Scratch | None = None,
) -> dict[str, Any]:
    """Writes the labels of one shard, from its embeddings alone.

    Args:
        task: a shard, and where its labels go.
        report: called with the number of records that are done.
        heads_folder: with `heads.npz`.
        weights_hash: of these heads.
        top_k: concepts of each kind.
        described: `Vocabulary.describe()`.
        found: its embeddings; None reads them.
        scratch: where a copy of them may be.

    Returns:
        The statistics.

    Raises:
        ValueError: the embeddings are of other records, or of another size than the heads take.
    """
    files.remove(task.stats_path)
    source = fingerprint.describe(task.source, task.identity)
    path = task.embedding.output
    if found is None:
        found = load_embeddings(path if scratch is None else scratch.find(path))
    heads = load_heads_once(heads_folder, weights_hash)
    shard = identify_shard(task)
    if shard[1] != len(found.key_hashes):
        raise ValueError(
            f"{task.source}: {shard[1]} records, but {path} was computed from "
            f"{len(found.key_hashes)}; delete that file and run data_prep.label again"
        )
    predicted = _predict(found, heads, top_k, path)
    sizes = [min(top_k, len(heads[k].bias)) if k in heads else 0 for k in vocabulary.KINDS]
    data, file = _encode(task, shard, described, sizes, found.rows, predicted)
    files.write_bytes(task.output, data)
    report(shard[1])
    counts = _count(found) | {
        "label_file": file._asdict(),
        "label_sizes": sizes,
        vocabulary.STATS_KEY: described,
    }
    stats = found.stats or shards.read_stats(task.embedding)
    if stats is not None:
        counts["missing"] = stats["counts"]["missing"]
    return shards.finish_task(task, source, counts, shard[1])


def write_no_labels(task: LabelTask, described: dict[str, Any], sizes: list[int]) -> LabelFile:
    """Writes a file in which no record of a shard has labels, until the shard can be labelled.

    Args:
        task: of a shard that has failed; it stays undone.
        described: `Vocabulary.describe()`.
        sizes: k of the objects, and of the attributes.

    Raises:
        ValueError: the shard cannot be looked at.
    """
    data, file = _encode(task, identify_shard(task), described, sizes, np.zeros(0, np.int64), {})
    files.write_bytes(task.output, data)
    return file


def identify_shard(task: LabelTask) -> tuple[str, int, int, str]:
    """Name, records, bytes and digest of what a task labels.

    Raises:
        ValueError: the shard is damaged.
    """
    if task.shard is not None:
        return task.shard
    return fingerprint_records(open_source([task.source.path])).shards[0]


def _encode(
    task: LabelTask,
    shard: tuple[str, int, int, str],
    described: dict[str, Any],
    sizes: list[int],
    rows: np.ndarray,
    predicted: dict[str, tuple[np.ndarray, np.ndarray]],
) -> tuple[bytes, LabelFile]:
    nothing = (np.zeros((len(rows), 0), np.int32), np.zeros((len(rows), 0), np.float32))
    return encode_labels(
        os.path.basename(task.output),
        shard,
        described,
        sizes,
        rows,
        [predicted.get(kind, nothing) for kind in vocabulary.KINDS],
    )


def label_file(stats: dict[str, Any]) -> LabelFile:
    """What the statistics of `write_labels` state of the file."""
    return LabelFile(**stats["counts"]["label_file"])


def label_shard(
    task: LabelTask,
    report: Report,
    *,
    heads_folder: str,
    weights_hash: str,
    top_k: int,
    described: dict[str, Any],
    found: ShardEmbeddings | None = None,
    records_copy: str | None = None,
    scratch: Scratch | None = None,
) -> dict[str, Any]:
    """Writes one shard again, with labels in its records.

    Args:
        task: a shard, and where its labelled version goes.
        report: called with the number of records that are done.
        heads_folder: with `heads.npz`.
        weights_hash: of these heads.
        top_k: concepts of each kind.
        described: `Vocabulary.describe()`, for the statistics.
        found: its embeddings; None reads them.
        records_copy: of `compute_embeddings`, to be read in place of the shard.
        scratch: where copies of both may be.

    Returns:
        The shard's statistics.

    Raises:
        ValueError: a damaged shard, or embeddings of other records.
    """
    path = task.embedding.output
    if found is None:
        found = load_embeddings(path if scratch is None else scratch.find(path))
    if scratch is not None and scratch.has(task.source.path):
        records_copy = scratch.find(task.source.path)
    process = functools.partial(
        _process,
        records_copy=records_copy,
        embeddings=path,
        found=found,
        heads=load_heads_once(heads_folder, weights_hash),
        top_k=top_k,
        described=described,
        report=report,
    )
    return shards.run_task(task, process)


def _process(
    source: SourceShard,
    writer: RecordWriter,
    *,
    records_copy: str | None,
    embeddings: str,
    found: ShardEmbeddings,
    heads: dict[str, Head],
    top_k: int,
    described: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    predicted = _predict(found, heads, top_k, embeddings)
    row_of = {number: row for row, number in enumerate(found.rows.tolist())}
    added_bytes, unreported = 0, 0
    records = read_shard(source) if records_copy is None else _read_copy(records_copy)
    for number, record in enumerate(records):
        if number >= len(found.key_hashes) or found.key_hashes[number] != hash_key(record.key):
            raise ValueError(
                f"{source}: record {number} ('{record.key}') is not the one that {embeddings} was "
                "computed from; delete that file and run data_prep.label again"
            )
        data = schema.encode_record(_add_concepts(record, predicted, row_of.get(number)))
        added_bytes += len(data) - len(schema.encode_record(_without_concepts(record)))
        writer.write(data)
        unreported += 1
        if unreported == _REPORT_EVERY:
            report(unreported)
            unreported = 0
    report(unreported)
    return _count(found) | {
        "added_bytes": added_bytes,
        "image_formats": _image_formats(source),
        vocabulary.STATS_KEY: described,
    }


def _read_copy(path: str) -> Iterator[Record]:
    return map(decode_record, read_records(path))


def _predict(
    found: ShardEmbeddings, heads: dict[str, Head], top_k: int, path: str
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Kind -> ids and probabilities [m, k] of the records with an embedding, if there are any."""
    if not len(found.rows):
        return {}
    for kind, head in heads.items():
        if found.embeddings.shape[1] != len(head.kernel):
            raise ValueError(
                f"{path}: embeddings of size {found.embeddings.shape[1]}; the head of the {kind} "
                f"takes {len(head.kernel)}"
            )
    return {kind: head.predict(found.embeddings, top_k) for kind, head in heads.items()}


def _count(found: ShardEmbeddings) -> dict[str, int]:
    labelled = len(found.rows)
    return {"labelled": labelled, "unlabelled": len(found.key_hashes) - labelled}


def _add_concepts(
    record: Record, predicted: dict[str, tuple[np.ndarray, np.ndarray]], row: int | None
) -> Record:
    """The record with its predictions; none where it has no embedding, or the kind no head."""
    values = {}
    for kind, names in zip(vocabulary.KINDS, schema.CONCEPT_FIELDS, strict=True):
        has_label = row is not None and kind in predicted
        arrays = [part[row] for part in predicted[kind]] if has_label else _NOTHING
        values |= dict(zip(names, arrays, strict=True))
    return dataclasses.replace(record, **values)


def _without_concepts(record: Record) -> Record:
    return dataclasses.replace(
        record, **{name: None for names in schema.CONCEPT_FIELDS for name in names}
    )


def _image_formats(source: SourceShard) -> dict[str, int]:
    """What the filter counted; it decides how the data set describes its images."""
    path = source.path + shards.STATS_SUFFIX
    try:
        return json.loads(files.read_bytes(path))["counts"]["image_formats"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no counts of image formats; filter the shard again") from error
