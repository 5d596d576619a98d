"""Labels of one shard: concepts, or embeddings of CLIP teachers.

Labels go into a separate file or into merged records. Separate concept labels are made from the
embeddings alone, without reading records. Merged shards keep keys, order and all other fields.

Functions that run as tasks take a `task` with a shard and the output path of its labels, and
`report`, which is called with the number of finished records.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.jobs import shards
from data_prep.jobs.engine import Report
from data_prep.labelling import embeddings
from data_prep.labelling.heads import Head, load_heads
from data_prep.labelling.tasks import LabelTask
from data_prep.teachers.clip import open_clip_teachers
from diht_jax.data.index import update_index
from diht_jax.readers.registry import SourceShard
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.formats import open_writer
from diht_jax.records.labels.clip_embeddings import ClipFacts
from diht_jax.records.labels.shards import (
    NO_CONCEPTS,
    Concepts,
    LabelShard,
    describe_labels,
    encode_label,
    id_dtype,
    seal,
)
from diht_jax.records.schema import CONCEPT_FIELDS, Record, encode_record
from diht_jax.records.shard_files import RecordHash, RecordWriter
from diht_jax.records.vocabulary import KINDS, STATS_KEY
from diht_jax.storage import files

# Objects and attributes of each record.
_Predicted = list[list[Concepts]]


def embed_and_label(
    task: LabelTask, report: Report, *, config: ml_collections.ConfigDict, heads: Mapping[str, Any]
) -> None:
    """Embeds and labels one shard in one pass over its records; also writes the embeddings.

    Raises:
        ValueError: see `embed_shard` and `label_shard`.
    """
    for path in (task.stats_path, task.embedding.output + shards.FAILED_SUFFIX):
        files.remove(path)
    with embeddings.LocalCopies.open(math.inf, with_records=config.merge) as copies:
        embeddings.embed_shard(task, report, config=config, copies=copies)
        label_shard(task, lambda _: None, config=config, heads=heads, copies=copies)


def label_shard(
    task: LabelTask,
    report: Report,
    *,
    config: ml_collections.ConfigDict,
    heads: Mapping[str, Any],
    copies: embeddings.LocalCopies,
) -> None:
    """Labels one shard from its embeddings; embeddings and records may come from local copies.

    `heads` has the "weights_hash" and the "vocabulary" of the heads in the output folder.

    Raises:
        ValueError: the embeddings belong to other records, or have the wrong size for the heads.
    """
    found = embeddings.load_embeddings(task.embedding, copies)
    loaded = load_heads(config.output, heads["weights_hash"])
    predicted = _predict(found, loaded, config.top_k, task.embedding.output)
    counts = {
        "labelled": len(found.rows),
        "unlabelled": len(found.keys) - len(found.rows),
        "missing": found.missing,
        STATS_KEY: heads["vocabulary"],
    }

    def process(source: SourceShard, writer: RecordWriter) -> dict[str, Any]:
        if not config.merge:
            shard, ids_type = task.identify(), id_dtype(heads["vocabulary"])
            if shard[1] != len(found.keys):
                difference = f"{shard[1]} records, and there are {len(found.keys)} embeddings"
                raise _of_others(task, difference)
            for number, key in enumerate(found.keys):
                label = encode_label(seal(shard, number, key), predicted[number], ids_type)
                writer.write(label)
            report(len(found.keys))
            return counts | {"shard": shard}
        copy = copies.find(source.path)
        records = embeddings.read_shard(SourceShard("tfrecord", copy) if copy else source)
        added_bytes = 0
        for number, (record, key) in enumerate(itertools.zip_longest(records, found.keys)):
            if record is None or record.key != key:
                there = "no record" if record is None else f"'{record.key}'"
                difference = f"record {number} is {there}, and that of the embeddings {key}"
                raise _of_others(task, difference)
            data = encode_record(_with_concepts(record, predicted[number]))
            added_bytes += len(data) - len(encode_record(_with_concepts(record, None)))
            writer.write(data)
            report(1)
        return counts | {"added_bytes": added_bytes, "image_formats": _image_formats(source)}

    shards.run_task(task, process)


def _of_others(task: LabelTask, difference: str) -> ValueError:
    return ValueError(
        f"{task.source} is not the shard that {task.embedding.output} was computed from "
        f"({difference}); delete that file and run data_prep.label again"
    )


def _predict(
    found: embeddings.ShardEmbeddings, heads: dict[str, Head], top_k: int, path: str
) -> _Predicted:
    """Predicts objects and attributes of every record; empty without an embedding or a head.

    Raises:
        ValueError: the embeddings in `path` have the wrong size for the heads.
    """
    predicted = [[NO_CONCEPTS] * len(KINDS) for _ in found.keys]
    for kind, head in heads.items() if len(found.rows) else ():
        if found.embeddings.shape[1] != len(head.kernel):
            raise ValueError(
                f"{path}: embeddings of size {found.embeddings.shape[1]}; the head of the {kind} "
                f"takes {len(head.kernel)}"
            )
        ids, probs = head.predict(found.embeddings, top_k)
        for number, row in enumerate(found.rows.tolist()):
            predicted[row][KINDS.index(kind)] = ids[number], probs[number]
    return predicted


def _with_concepts(record: Record, concepts: list[Concepts] | None) -> Record:
    values = {}
    for number, names in enumerate(CONCEPT_FIELDS):
        values |= dict(zip(names, concepts[number] if concepts else (None, None), strict=True))
    return dataclasses.replace(record, **values)


def _image_formats(source: SourceShard) -> dict[str, int]:
    """Returns the filter's counts of image formats, which TFDS metadata depends on."""
    path = source.path + shards.STATS_SUFFIX
    try:
        return shards.read_json(path)["counts"]["image_formats"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no counts of image formats; filter the shard again") from error


def embed_by_clips(
    task: LabelTask, report: Report, *, teachers: ml_collections.ConfigDict, facts: ClipFacts
) -> None:
    """Writes the embeddings of CLIP teachers for the views and captions of one shard.

    Raises:
        ValueError: the shard is damaged, or embeddings are not finite.
    """

    def process(source: SourceShard, writer: RecordWriter) -> dict[str, Any]:
        shard, missing = task.identify(), collections.Counter()
        teacher = open_clip_teachers(teachers)
        for record, result in embeddings.embed_records(task, report, teacher, teachers.batch_size):
            is_missing = isinstance(result, str)
            if is_missing:
                missing[result] += 1
            sealed = seal(shard, len(writer), record.key)
            writer.write(facts.encode(record.key, sealed, None if is_missing else result))
        if len(writer) != shard[1]:
            raise ValueError(f"{source}: {len(writer)} records, expected {shard[1]}")
        embedded = len(writer) - missing.total()
        return {"embedded": embedded, "missing": dict(sorted(missing.items())), "shard": shard}

    shards.run_task(task, process)


def write_labels_index(
    folder: str,
    done: Sequence[Mapping[str, Any]],
    failed: Sequence[LabelTask],
    inputs: Sequence[str],
    *,
    vocabulary: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> int:
    """Writes the index of a folder of labels; failed shards get empty labels.

    Returns:
        The number of labels.
    """
    listed = [
        LabelShard(
            stats["output"]["file"], stats["output"]["digest"][:16], tuple(stats["counts"]["shard"])
        )
        for stats in done
    ]
    for task in failed:
        try:
            listed.append(_write_no_labels(task))
        except ValueError as error:
            logging.warning("%s: it cannot be trained on (%s)", task.source, error)
    if failed:  # their shards may have new sizes
        files.remove(files.join(folder, INDEX_NAME))
    update_index(folder, vocabulary=vocabulary, labels=describe_labels(listed, inputs, facts))
    return sum(shard.source[1] for shard in listed)


def _write_no_labels(task: LabelTask) -> LabelShard:
    """Writes empty labels for a failed shard; its task remains unfinished.

    Raises:
        ValueError: the shard cannot be read.
    """
    shard = task.identify()
    with open_writer(task.output) as writer:
        writer.hash = RecordHash()
        for _ in range(shard[1]):
            writer.write(b"")
    return LabelShard(task.name, writer.hash.digest()[:16], shard)
