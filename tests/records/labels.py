"""Folders of labels for tests, without a teacher."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence

from diht_jax.data.index import update_index
from diht_jax.records.fingerprint import fingerprint_records
from diht_jax.records.formats.registry import open_source
from diht_jax.records.labels.concepts import Concepts, encode_label, id_dtype
from diht_jax.records.labels.shards import (
    LabelShard,
    describe_labels,
    label_shard_name,
    relative_input,
)
from diht_jax.records.tfrecord import TFRecordWriter
from diht_jax.records.vocabulary import Vocabulary, write_vocabulary


def write_labels(
    folder: str | pathlib.Path,
    records: str | pathlib.Path,
    labels: Sequence[Sequence[Concepts]],
    vocabulary: Vocabulary,
) -> pathlib.Path:
    """Writes a folder as `data_prep.label` does, and returns it.

    Args:
        folder: is made.
        records: folder of the record shards.
        labels: of each record, the objects and the attributes.
        vocabulary: what the ids mean.
    """
    folder = pathlib.Path(folder)
    (folder / "labels").mkdir(parents=True)
    source = open_source(str(records))
    described, shards, index = vocabulary.describe(), [], 0
    for identity, length in zip(
        fingerprint_records(source).shards, source.shard_lengths.tolist(), strict=True
    ):
        name, digest = label_shard_name(identity[0]), hashlib.sha256()
        with TFRecordWriter(folder / "labels" / name) as writer:
            for _ in range(length):
                key = source.decode(source[index]).key
                data = encode_label(key, labels[index], id_dtype(described))
                writer.write(data)
                digest.update(data)
                index += 1
        shards.append(LabelShard(name, digest.hexdigest()[:16], identity))
    stated = describe_labels(shards, [relative_input(str(records), str(folder))])
    update_index(str(folder / "labels"), vocabulary=described, labels=stated)
    write_vocabulary(folder, vocabulary)
    return folder
