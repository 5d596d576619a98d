"""Writes folders of labels for tests, without a teacher."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diht_jax.data.index import update_index
from diht_jax.records.formats import TFRecordWriter, open_source
from diht_jax.records.labels.clip_embeddings import ClipFacts
from diht_jax.records.labels.shards import (
    CLIP_EMBEDDINGS,
    Concepts,
    LabelShard,
    describe_labels,
    encode_label,
    id_dtype,
    label_shard_name,
    seal,
)
from diht_jax.records.train_data import LABELS, fingerprint_records, relative_input
from diht_jax.records.vocabulary import Vocabulary, write_vocabulary


def write_labels(
    folder: str | pathlib.Path,
    records: str | pathlib.Path,
    labels: Sequence[Sequence[Concepts]],
    vocabulary: Vocabulary,
) -> pathlib.Path:
    """Writes a folder as `data_prep.label` does, and returns it.

    Args:
        folder: is created.
        records: folder of the record shards.
        labels: the objects and the attributes of each record.
        vocabulary: the meaning of the ids.
    """
    described = vocabulary.describe()

    def encode(index: int, key: str, sealed: int) -> bytes:
        return encode_label(sealed, labels[index], id_dtype(described))

    folder = pathlib.Path(folder)
    _write_shards(folder, LABELS, records, encode, vocabulary=described)
    write_vocabulary(folder, vocabulary)
    return folder


def write_clip_embeddings(
    folder: pathlib.Path, records: pathlib.Path, facts: ClipFacts, vectors: np.ndarray
) -> None:
    """Adds CLIP teachers' embeddings to a folder: for n records, [n, views + 1, D]."""

    def encode(index: int, key: str, sealed: int) -> bytes:
        return facts.encode(key, sealed, vectors[index])

    _write_shards(folder, CLIP_EMBEDDINGS, records, encode, facts=facts.describe())


def _write_shards(
    folder: pathlib.Path,
    kind: str,
    records: str | pathlib.Path,
    encode: Callable[[int, str, int], bytes],
    vocabulary: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
) -> None:
    """Writes shards of the results of `encode` for the number, key and seal of each record."""
    (folder / kind).mkdir(parents=True)
    source = open_source(str(records))
    shards, index = [], 0
    for identity, length in zip(
        fingerprint_records(source).shards, source.shard_lengths.tolist(), strict=True
    ):
        name, digest = label_shard_name(identity[0]), hashlib.sha256()
        with TFRecordWriter(folder / kind / name) as writer:
            for number in range(length):
                key = source.decode(source[index]).key
                data = encode(index, key, seal(identity, number, key))
                writer.write(data)
                digest.update(data)
                index += 1
        shards.append(LabelShard(name, digest.hexdigest()[:16], identity))
    stated = describe_labels(shards, [relative_input(str(records), str(folder))], facts)
    update_index(str(folder / kind), vocabulary=vocabulary, labels=stated)
