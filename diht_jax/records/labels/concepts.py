"""Concept labels of one record, as they are stored next to the record shards.

The feature `labels` of a `tf.train.Example`, little-endian::

    uint32 seal of the record (`shards.seal`) | uint8 number of objects | uint8 of attributes
    ids | float16 probabilities

First come the ids of the objects, likeliest first, then those of the attributes; the probabilities
are in the same order. Ids are uint16, or uint32 for vocabularies above 65,536. Ten of each kind
take 120 bytes with the frame of a TFRecord. A record without labels has no ids, or no feature at
all.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diht_jax.records.labels.shards import (
    LABELS,
    REMAKE,
    Label,
    LabelRecords,
    decode_features,
    encode_features,
    missing_labels,
)
from diht_jax.records.schema import CONCEPT_FIELDS, Record, check_concepts
from diht_jax.records.sharded import ShardedRecords

_FEATURE = "labels"
_HEAD = struct.Struct("<IBB")
_PROBABILITY = np.dtype("<f2")

# Ids and probabilities of one kind of concepts, likeliest first.
Concepts = tuple[np.ndarray, np.ndarray]
NO_CONCEPTS: Concepts = (np.zeros(0, np.int32), np.zeros(0, np.float32))


def id_dtype(vocabulary: Mapping[str, Any]) -> np.dtype:
    """The type of stored ids."""
    largest = max(part["size"] for part in vocabulary.values())
    return np.dtype("<u2" if largest <= 2**16 else "<u4")


def encode_label(seal: int, concepts: Sequence[Concepts], ids_type: np.dtype) -> bytes:
    """The label of a record with the concepts of its objects, and of its attributes."""
    head = _HEAD.pack(seal, *(len(ids) for ids, _ in concepts))
    ids = b"".join(ids.astype(ids_type).tobytes() for ids, _ in concepts)
    probs = b"".join(probs.astype(_PROBABILITY).tobytes() for _, probs in concepts)
    return encode_features({_FEATURE: head + ids + probs})


def decode_label(label: Label, key: str) -> list[Concepts]:
    """Ids int32 [k] and probabilities float32 [k] of each kind, of the label of a record.

    Raises:
        ValueError: the label of another record than that of the key, or one that is damaged.
    """
    packed = decode_features(label.data).get(_FEATURE)
    if packed is None:
        return [NO_CONCEPTS, NO_CONCEPTS]
    if len(packed) < _HEAD.size:
        raise ValueError(f"a label of {len(packed)} bytes is cut off; {REMAKE}")
    found, *counts = _HEAD.unpack_from(packed)
    label.check(found, key)
    total = sum(counts)
    if not total:
        return [NO_CONCEPTS, NO_CONCEPTS]
    width, rest = divmod(len(packed) - _HEAD.size, total)
    width -= _PROBABILITY.itemsize
    if rest or width not in (2, 4):
        raise ValueError(
            f"a label of {len(packed)} bytes for {counts[0]} objects and {counts[1]} attributes; "
            f"{REMAKE}"
        )
    ids = np.frombuffer(packed, f"<u{width}", total, _HEAD.size).astype(np.int32)
    probs = np.frombuffer(packed, _PROBABILITY, total, _HEAD.size + width * total)
    probs = probs.astype(np.float32)
    return [(ids[: counts[0]], probs[: counts[0]]), (ids[counts[0] :], probs[counts[0] :])]


class ConceptLabels(LabelRecords):
    """Concept labels of records, which come in place of concepts of the records' own."""

    kind = LABELS

    def _join(self, record: Record, label: Label) -> Record:
        values: dict[str, np.ndarray] = {}
        concepts = decode_label(label, record.key)
        for names, (ids, probs) in zip(CONCEPT_FIELDS, concepts, strict=True):
            check_concepts(record.key, names[0], ids, names[1], probs)
            values |= {names[0]: ids, names[1]: probs}
        return dataclasses.replace(record, **values)


def open_labels(folder: str, records: ShardedRecords, key: str, **options: Any) -> ConceptLabels:
    """The concept labels of some records; arguments and errors of `LabelRecords.open`.

    Raises:
        ValueError: the folder has no labels.
    """
    found = ConceptLabels.open(folder, records, key, **options)
    if found is None:
        raise missing_labels(folder, key)
    return found
