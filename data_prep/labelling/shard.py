"""One shard with labels: the heads' likeliest concepts added to every record.

Keys, order and everything else of the records stay as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import numpy as np

from data_prep.jobs import shards
from data_prep.jobs.engine import Report
from data_prep.labelling.embeddings import embedding_path, hash_key, load_embeddings, read_shard
from data_prep.labelling.heads import Head, load_heads
from diht_jax.data.readers.registry import SourceShard
from diht_jax.data.records import schema, vocabulary
from diht_jax.data.records.formats.writer import RecordWriter
from diht_jax.data.records.schema import Record

_REPORT_EVERY = 256
_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float32))


def label_shard(
    task: shards.ShardTask,
    report: Report,
    *,
    heads_folder: str,
    top_k: int,
    described: dict[str, Any],
) -> dict[str, Any]:
    """Labels one shard.

    Args:
        task: a shard, and where its labelled version goes.
        report: called with the number of records that are done.
        heads_folder: with `heads.npz`.
        top_k: concepts of each kind.
        described: `Vocabulary.describe()`, for the statistics.

    Returns:
        The shard's statistics.

    Raises:
        ValueError: a damaged shard, or embeddings of other records.
    """
    process = functools.partial(
        _process,
        embeddings=embedding_path(task.output),
        heads=load_heads(heads_folder),
        top_k=top_k,
        described=described,
        report=report,
    )
    return shards.run_task(task, process)


def _process(
    source: SourceShard,
    writer: RecordWriter,
    *,
    embeddings: str,
    heads: dict[str, Head],
    top_k: int,
    described: dict[str, Any],
    report: Report,
) -> dict[str, Any]:
    found = load_embeddings(embeddings)
    for kind, head in heads.items():
        if len(found.rows) and found.embeddings.shape[1] != len(head.kernel):
            raise ValueError(
                f"{embeddings}: embeddings of size {found.embeddings.shape[1]}; the head of the "
                f"{kind} takes {len(head.kernel)}"
            )
    predicted = {
        kind: head.predict(found.embeddings, top_k)
        for kind, head in heads.items()
        if len(found.rows)
    }
    row_of = {number: row for row, number in enumerate(found.rows.tolist())}
    added_bytes, unreported = 0, 0
    for number, record in enumerate(read_shard(source)):
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
    return {
        "labelled": len(found.rows),
        "unlabelled": len(writer) - len(found.rows),
        "added_bytes": added_bytes,
        "image_formats": _image_formats(source),
        vocabulary.STATS_KEY: described,
    }


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
        with open(path, "rb") as file:
            return json.load(file)["counts"]["image_formats"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: no counts of image formats; filter the shard again") from error
