"""Shards of labels: TFRecord shards with one record for each record of a record shard.

A folder that `data_prep.label` writes has

    labels/NAME.tfrecord            concept labels of the shard NAME, record for record
    clip_embeddings/NAME.tfrecord   embeddings of CLIP teachers, likewise (`clip_embeddings.py`)
    vocabulary_*.tsv                what the ids mean

Each of the two folders has an `.idx` for each shard, and a `dataset.index`. The JSON in the head of
that index has an entry `labels`. It states the record shard of each shard of labels, by name,
number of records, bytes and digest (`Fingerprint`). A run therefore detects labels of other records
when it starts, wherever the record shards are. A label also holds a checksum of its record
(`seal`), which detects reordered or exchanged labels when they are read.

A label is a `tf.train.Example` with features of bytes. The label of concepts has the feature
`labels`, little-endian::

    uint32 seal of the record | uint8 number of objects | uint8 of attributes
    ids | float16 probabilities

First come the ids of the objects, likeliest first, then those of the attributes; the probabilities
are in the same order. Ids are uint16, or uint32 for vocabularies above 65,536. Ten of each kind
take 120 bytes including the TFRecord frame. A record without labels has no ids, or no feature.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import google_crc32c
import numpy as np

from diht_jax.records.dataset_index import INDEX_NAME, DatasetIndex, read_index
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.schema import CONCEPT_FIELDS, Example, Record, check_concepts, parse_example
from diht_jax.records.shard_files import DamagedRecordError, kind_of
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.train_data import LABELS, fingerprint_records
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.stores import StorageError, is_remote

CLIP_EMBEDDINGS = "clip_embeddings"

_MAX_OPEN_COPIES = 128
_REMAKE = "delete this file, and run `python -m data_prep.label` again"
_ADVICE = "copy the whole folder again, or run `python -m data_prep.label` again"

_FEATURE = "labels"
_HEAD = struct.Struct("<IBB")
_PROBABILITY = np.dtype("<f2")
# (name, records, bytes, digest) of a record shard, as in a `Fingerprint`.
ShardIdentity = tuple[str, int, int, str]
# (ids, probabilities) of one kind of concepts, likeliest first.
Concepts = tuple[np.ndarray, np.ndarray]
NO_CONCEPTS: Concepts = (np.zeros(0, np.int32), np.zeros(0, np.float32))


class LabelShard(NamedTuple):
    """A shard of labels and its record shard."""

    name: str  # file name
    digest: str  # digest of all its records
    source: ShardIdentity  # the record shard that it belongs to


class Label(NamedTuple):
    """The label of one record."""

    data: bytes  # a serialised `tf.train.Example`
    where: str  # path of the file, for messages
    shard: ShardIdentity  # the record shard that it belongs to
    number: int  # number of the record in both shards

    def check(self, found: int, key: str) -> None:
        """Raises ValueError if `found`, the seal in the label, does not match the record `key`."""
        if found != seal(self.shard, self.number, key):
            raise ValueError(f"the label belongs to another record than '{key}'; {_REMAKE}")


def seal(shard: ShardIdentity, number: int, key: str) -> int:
    """Returns a CRC32C of the record shard's digest, the record's number in it, and its key."""
    return google_crc32c.value(f"{shard[3]} {number} ".encode() + encode_key(key))


def label_shard_name(shard: str) -> str:
    """Returns the file name of the label shard of a record shard."""
    name = os.path.basename(shard)
    return name if kind_of(name) == "tfrecord" else f"{name}.tfrecord"


def encode_features(features: Mapping[str, bytes]) -> bytes:
    """Serialises bytes features as a `tf.train.Example`; equal features give equal bytes."""
    example = Example()
    for name, data in features.items():
        example.features.feature[name].bytes_list.value.append(data)
    return example.SerializeToString(deterministic=True)


def decode_features(data: bytes) -> dict[str, bytes]:
    """Inverts `encode_features`; raises ValueError for other bytes."""
    features = {}
    for name, feature in parse_example(data).items():
        if len(feature.bytes_list.value) != 1:
            raise ValueError(f"feature '{name}': expected one value of bytes")
        features[name] = feature.bytes_list.value[0]
    return features


def encode_key(key: str) -> bytes:
    """Encodes a record's key as bytes, even if it is not valid UTF-8."""
    return key.encode("utf-8", "surrogatepass")


def decode_key(data: bytes) -> str:
    """Inverts `encode_key`."""
    return data.decode("utf-8", "surrogatepass")


def describe_labels(
    shards: Sequence[LabelShard], inputs: Sequence[str], facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Returns the entry `labels` for the `dataset.index` of a folder of labels.

    `inputs` are paths or URLs of the labelled records, from `relative_input`. `facts` are further
    JSON-able facts about the labels.
    """
    rows = [[shard.name, shard.digest, list(shard.source)] for shard in shards]
    return {"inputs": list(inputs), "shards": rows, "facts": dict(facts or {})}


def read_labels_index(
    kind: str, folder: str, key: str = "config.data.labels"
) -> DatasetIndex | None:
    """Reads the index of a folder of labels; None if it has no labels of this kind.

    Raises:
        ValueError: the index is damaged or was not written by `data_prep.label`, or the concept
            labels are missing.
    """
    index = read_index(os.path.join(folder, kind))
    if index is None and kind == LABELS:
        raise ValueError(
            f"{key}={folder}: {LABELS}/{INDEX_NAME} is missing; expected the output folder of a "
            "run of `python -m data_prep.label` that was finished"
        )
    if index is not None and not index.labels:
        raise ValueError(
            f"{key}={folder}: {kind}/{INDEX_NAME} does not state which records the {kind} belong "
            "to; run `python -m data_prep.label` again"
        )
    return index


@dataclasses.dataclass(eq=False, repr=False)
class LabelRecords(Sequence[Label]):
    """The labels of the records of a data set, by the number of the record.

    Can be pickled and shared by threads. A label shard in a store is copied to this host when one
    of its records is first read, once for all processes of the host.
    """

    kind: ClassVar[str]  # `LABELS` or `CLIP_EMBEDDINGS`

    records: TFRecordSource  # of all label shards
    shards: Sequence[LabelShard]  # in the order of `records`
    facts: Mapping[str, Any]  # the facts given to `describe_labels`
    cache_dir: str | None = None  # see `open`, likewise the next one
    patiently: Callable[[Callable[[], Any]], Any] | None = None

    def __post_init__(self):
        found = fingerprint_records(self.records).shards
        pairs = zip(self.shards, found, strict=True)
        self._shards = dict(zip(self.records.paths, pairs, strict=True))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Label:
        """Reads the label of a record.

        Raises:
            TFRecordError: the label is damaged, or its shard was replaced.
        """
        path, number = self.records.locate(index)
        shard, (_, _, num_bytes, _) = self._shards[path]
        try:
            if is_remote(path):
                name = f"{shard.digest}-{shard.name}"
                copy = _open_copy(self.cache_dir, self.patiently, path, name, num_bytes)
                return Label(copy[number], path, shard.source, number)
            return Label(self.records[index], path, shard.source, number)
        except DamagedRecordError as error:
            raise DamagedRecordError(f"{error} ({_REMAKE})") from error

    def join(self, record: Record, index: int) -> Record:
        """Joins a record with the label of the given number.

        Raises:
            ValueError: the label is damaged or of another record; names its file and number.
        """
        label = self[index]
        try:
            return self._join(record, label)
        except ValueError as error:
            raise ValueError(f"{label.where}: record {label.number}: {error}") from error

    def _join(self, record: Record, label: Label) -> Record:
        raise NotImplementedError

    def fingerprint(self) -> tuple[ShardIdentity, ...]:
        """Returns the rows of a `Fingerprint` for the label shards."""
        rows = (self._shards[path] for path in self.records.paths)
        return tuple(
            (f"{self.kind}/{name}", count, size, shard.digest)
            for shard, (name, count, size, _) in rows
        )

    @classmethod
    def open(
        cls,
        folder: str,
        records: ShardedRecords,
        key: str = "config.data.labels",
        *,
        cache_dir: str | None = None,
        patiently: Callable[[Callable[[], Any]], Any] | None = None,
    ) -> Self | None:
        """Opens the labels of some records, after checking that they belong to these records.

        Opens no label shard, and no record shard that a `dataset.index` describes.

        Args:
            folder: path or URL of an output folder of `data_prep.label`.
            cache_dir: folder for copies of shards in a store. None uses a per-user folder in the
                system's temporary one.
            patiently: calls a function until a store answers; None calls it once.

        Returns:
            None if the folder has no labels of this kind.

        Raises:
            ValueError: a label shard is missing or was replaced, or a record shard has none.
        """
        index = read_labels_index(cls.kind, folder, key)
        if index is None:
            return None
        rows = index.labels["shards"]
        stated = [LabelShard(name, digest, tuple(source)) for name, digest, source in rows]
        where = f"{key}={folder}"
        shards = _match_shards(cls.kind, stated, records, where)
        try:
            source = TFRecordSource([os.path.join(folder, cls.kind, each.name) for each in shards])
        except StorageError:
            raise
        except ValueError as error:
            raise ValueError(
                f"{where}: a shard of {cls.kind} is missing or changed ({error}); {_ADVICE}"
            ) from error
        counts = zip(source.paths, source.shard_lengths, records.shard_lengths, strict=True)
        for path, count, expected in counts:
            if count != expected:
                raise ValueError(
                    f"{where}: {path} has {count} records, and the shard that it belongs to has "
                    f"{expected}; {_ADVICE}"
                )
        return cls(source, shards, index.labels["facts"], cache_dir, patiently)


# The cache locks in C, so a fork cannot inherit a locked Python lock.
@functools.lru_cache(_MAX_OPEN_COPIES)
def _open_copy(
    cache_dir: str | None,
    patiently: Callable[[Callable[[], Any]], Any] | None,
    url: str,
    name: str,
    num_bytes: int,
) -> TFRecordSource:
    """Opens the records of a shard's local copy; the first call builds the copy's index."""
    advice = "name another folder by config.data.cache_dir"
    copy = functools.partial(cached_copy, url, name, num_bytes, cache_dir, advice)
    return TFRecordSource([patiently(copy) if patiently else copy()])


def _match_shards(
    kind: str, stated: Sequence[LabelShard], records: ShardedRecords, where: str
) -> list[LabelShard]:
    """Returns the label shard of every record shard, in order; ValueError if one is missing."""
    by_source = {shard.source: shard for shard in stated}
    by_name = {shard.source[0]: shard for shard in stated}
    matched = []
    for found, path in zip(fingerprint_records(records).shards, records.paths, strict=True):
        if found not in by_source:
            detail = f"no {kind} of the shard {path}"
            if (other := by_name.get(found[0])) is not None:
                detail = (
                    f"{kind}/{other.name} belongs to another shard than {path}, by "
                    f"{kind}/{INDEX_NAME}: records, bytes and digest are {other.source[1:]} of "
                    f"that one and {found[1:]} of this one"
                )
            raise ValueError(
                f"{where}: {detail}; label these records with `python -m data_prep.label`, or name "
                "the labels of theirs"
            )
        matched.append(by_source[found])
    return matched


def id_dtype(vocabulary: Mapping[str, Any]) -> np.dtype:
    """Returns the dtype of the stored ids for a vocabulary."""
    largest = max(part["size"] for part in vocabulary.values())
    return np.dtype("<u2" if largest <= 2**16 else "<u4")


def encode_label(seal: int, concepts: Sequence[Concepts], ids_type: np.dtype) -> bytes:
    """Encodes the label of a record from the concepts of its objects and attributes."""
    head = _HEAD.pack(seal, *(len(ids) for ids, _ in concepts))
    ids = b"".join(ids.astype(ids_type).tobytes() for ids, _ in concepts)
    probs = b"".join(probs.astype(_PROBABILITY).tobytes() for _, probs in concepts)
    return encode_features({_FEATURE: head + ids + probs})


def decode_label(label: Label, key: str) -> list[Concepts]:
    """Decodes a concept label into (ids int32 [k], probabilities float32 [k]) of each kind.

    Raises:
        ValueError: the label is damaged, or belongs to another record than `key`.
    """
    packed = decode_features(label.data).get(_FEATURE)
    if packed is None:
        return [NO_CONCEPTS, NO_CONCEPTS]
    if len(packed) < _HEAD.size:
        raise ValueError(f"a label of {len(packed)} bytes is cut off; {_REMAKE}")
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
            f"{_REMAKE}"
        )
    ids = np.frombuffer(packed, f"<u{width}", total, _HEAD.size).astype(np.int32)
    probs = np.frombuffer(packed, _PROBABILITY, total, _HEAD.size + width * total)
    probs = probs.astype(np.float32)
    return [(ids[: counts[0]], probs[: counts[0]]), (ids[counts[0] :], probs[counts[0] :])]


class ConceptLabels(LabelRecords):
    """Concept labels of records, which replace any concepts in the records themselves."""

    kind = LABELS

    def _join(self, record: Record, label: Label) -> Record:
        values: dict[str, np.ndarray] = {}
        concepts = decode_label(label, record.key)
        for names, (ids, probs) in zip(CONCEPT_FIELDS, concepts, strict=True):
            check_concepts(record.key, names[0], ids, names[1], probs)
            values |= {names[0]: ids, names[1]: probs}
        return dataclasses.replace(record, **values)


def open_labels(folder: str, records: ShardedRecords, key: str, **options: Any) -> ConceptLabels:
    """Opens the concept labels of some records; arguments and errors as in `LabelRecords.open`."""
    found = ConceptLabels.open(folder, records, key, **options)
    assert found is not None
    return found
