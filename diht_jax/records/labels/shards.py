"""Shards of labels: TFRecord shards with one record for each record of a record shard.

A folder that `data_prep.label` writes has

    labels/NAME.tfrecord            concept labels of the shard NAME, record for record
    clip_embeddings/NAME.tfrecord   embeddings of CLIP teachers, likewise
    vocabulary_*.tsv                what the ids mean

Each of the two folders has an `.idx` for each shard, and a `dataset.index`. The JSON in the head of
that index states under `labels` which record shard each of them belongs to, by its name, number of
records, bytes and digest (`fingerprint.py`), so that labels of other records are noticed at the
start of a run, and the record shards may be anywhere. A label also holds a checksum of the record
that it belongs to (`seal`), so that labels in another order, or in another file, are noticed when
they are read.

A label is a `tf.train.Example` with features of bytes. What is in them belongs to `concepts.py` and
`clip_embeddings.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import google_crc32c

from diht_jax.records.catalog import kind_of
from diht_jax.records.dataset_index import INDEX_NAME, DatasetIndex, read_index
from diht_jax.records.fingerprint import fingerprint_records
from diht_jax.records.format import DamagedRecordError
from diht_jax.records.schema import Example, parse_example
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.tfrecord import TFRecordSource
from diht_jax.records.train_data import TrainSource
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.files import is_glob
from diht_jax.storage.retries import StorageError
from diht_jax.storage.stores import is_remote, open_system

LABELS = "labels"
CLIP_EMBEDDINGS = "clip_embeddings"

_MAX_OPEN_COPIES = 128
REMAKE = "delete this file, and run `python -m data_prep.label` again"
_ADVICE = "copy the whole folder again, or run `python -m data_prep.label` again"

# Name, records, bytes and digest of a record shard, as in a `Fingerprint`.
ShardIdentity = tuple[str, int, int, str]


class LabelShard(NamedTuple):
    """A shard of labels.

    Attributes:
        name: of the file.
        digest: of all its records.
        source: the record shard that it belongs to.
    """

    name: str
    digest: str
    source: ShardIdentity


class Label(NamedTuple):
    """The label of one record.

    Attributes:
        data: a serialised `tf.train.Example`.
        where: its file, for messages.
        shard: the record shard that it belongs to.
        number: of the record within either.
    """

    data: bytes
    where: str
    shard: ShardIdentity
    number: int

    def check(self, found: int, key: str) -> None:
        """Compares the seal in a label with that of a record.

        Raises:
            ValueError: the label belongs to another record.
        """
        if found != seal(self.shard, self.number, key):
            raise ValueError(f"the label belongs to another record than '{key}'; {REMAKE}")

    def wrong(self, error: ValueError) -> ValueError:
        """The error for a label that cannot be used; names its file and number."""
        return ValueError(f"{self.where}: record {self.number}: {error}")


def seal(shard: ShardIdentity, number: int, key: str) -> int:
    """A CRC32C of what a label belongs to: digest of the record shard, number within it, key."""
    return google_crc32c.value(f"{shard[3]} {number} ".encode() + encode_key(key))


def label_shard_name(shard: str) -> str:
    """The file name of the labels of a record shard."""
    name = os.path.basename(shard)
    return name if kind_of(name) == "tfrecord" else f"{name}.tfrecord"


def encode_features(features: Mapping[str, bytes]) -> bytes:
    """A serialised `tf.train.Example` of bytes; equal features give equal bytes."""
    example = Example()
    for name, data in features.items():
        example.features.feature[name].bytes_list.value.append(data)
    return example.SerializeToString(deterministic=True)


def decode_features(data: bytes) -> dict[str, bytes]:
    """The inverse of `encode_features`.

    Raises:
        ValueError: not such an example.
    """
    features = {}
    for name, feature in parse_example(data).items():
        if len(feature.bytes_list.value) != 1:
            raise ValueError(f"feature '{name}': expected one value of bytes")
        features[name] = feature.bytes_list.value[0]
    return features


def encode_key(key: str) -> bytes:
    """The bytes of a record's key, also of one that is not UTF-8."""
    return key.encode("utf-8", "surrogatepass")


def decode_key(data: bytes) -> str:
    """The inverse of `encode_key`."""
    return data.decode("utf-8", "surrogatepass")


def describe_labels(
    shards: Sequence[LabelShard], inputs: Sequence[str], facts: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The entry `labels` in the `dataset.index` of a folder of labels.

    Args:
        shards: all of them.
        inputs: paths or URLs of the labelled records, made by `relative_input`.
        facts: further JSON-able facts about the labels.
    """
    rows = [[shard.name, shard.digest, list(shard.source)] for shard in shards]
    return {"inputs": list(inputs), "shards": rows, "facts": dict(facts or {})}


def relative_input(path: str, folder: str) -> str:
    """An input as seen from the folder of the labels, if they are in one file system.

    Both may then be copied elsewhere together.
    """
    (system, path_there), (own, folder_there) = _split(path), _split(folder)
    return posixpath.relpath(path_there, folder_there) if system == own else path


def find_inputs(folder: str) -> list[str] | None:
    """Paths of the records that the labels in a folder belong to; None where it has no labels."""
    try:
        stated = read_index(os.path.join(folder, LABELS, INDEX_NAME)).labels
    except (FileNotFoundError, NotADirectoryError):
        return None
    system, folder_there = _split(folder)
    if not stated:
        return None
    return [
        text
        if is_remote(text) or os.path.isabs(text)
        else f"{system}{posixpath.normpath(posixpath.join(folder_there, text))}"
        for text in stated["inputs"]
    ]


def _split(path: str) -> tuple[str, str]:
    """The protocol of a URL, or nothing, and the absolute path behind it."""
    if is_remote(path):
        system, _, rest = path.partition("://")
        return f"{system}://", rest
    return "", os.path.abspath(path)


def resolve_source(source: TrainSource) -> TrainSource:
    """A source whose path is a folder of labels alone, as the records that these belong to."""
    if source.labels or not isinstance(source.path, str) or is_glob(source.path):
        return source
    inputs = find_inputs(source.path)
    return (
        source if inputs is None else dataclasses.replace(source, path=inputs, labels=source.path)
    )


def read_labels_index(
    kind: str, folder: str, key: str = "config.data.labels"
) -> tuple[DatasetIndex, Mapping[str, Any]] | None:
    """The index of a folder of labels, and its `labels`; None where there is none.

    Raises:
        ValueError: it is damaged, or was not written by `data_prep.label`.
    """
    try:
        index = read_index(os.path.join(folder, kind, INDEX_NAME))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if index.labels is None:
        raise ValueError(
            f"{key}={folder}: {kind}/{INDEX_NAME} does not state which records the {kind} belong "
            "to; run `python -m data_prep.label` again"
        )
    return index, index.labels


def missing_labels(folder: str, key: str = "config.data.labels") -> ValueError:
    """The error for a folder without concept labels."""
    return ValueError(
        f"{key}={folder}: {LABELS}/{INDEX_NAME} is missing; expected the output folder of a run of "
        "`python -m data_prep.label` that was finished"
    )


class LabelRecords(Sequence[Label]):
    """The labels of the records of a data set, by the number of the record.

    It can be pickled and shared by threads. A shard in a store is copied to this host when one of
    its records is read, once for all processes of the host.

    Attributes:
        kind: `LABELS` or `CLIP_EMBEDDINGS`.
        facts: of `describe_labels`.
    """

    def __init__(
        self,
        kind: str,
        records: TFRecordSource,
        shards: Sequence[LabelShard],
        facts: Mapping[str, Any],
        open_copy: Callable[[str, str, int], TFRecordSource],
    ):
        """Reads no label yet.

        Args:
            kind: `LABELS` or `CLIP_EMBEDDINGS`.
            records: the shards of labels, in the order of the record shards.
            shards: likewise.
            facts: of `describe_labels`.
            open_copy: URL, name and bytes of a shard in a store -> its records.
        """
        self.kind = kind
        self.facts = facts
        self._records = records
        self._identities = [
            (f"{kind}/{name}", count, size, shard.digest)
            for (name, count, size, _), shard in zip(
                fingerprint_records(records).shards, shards, strict=True
            )
        ]
        self._sources = {
            path: shard.source for path, shard in zip(records.paths, shards, strict=True)
        }
        self._copies = {
            path: (path, f"{shard.digest}-{shard.name}", identity[2])
            for path, shard, identity in zip(records.paths, shards, self._identities, strict=True)
        }
        self._open_copy = open_copy

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Label:
        """The label of a record.

        Raises:
            TFRecordError: it is damaged, or its shard was replaced.
        """
        path, number = self._records.locate(index)
        try:
            if is_remote(path):
                data = self._open_copy(*self._copies[path])[number]
            else:
                data = self._records[index]
        except DamagedRecordError as error:
            raise DamagedRecordError(f"{error} ({REMAKE})") from error
        return Label(data, path, self._sources[path], number)

    def fingerprint(self) -> tuple[ShardIdentity, ...]:
        """Rows of a `Fingerprint` for the shards of labels."""
        return tuple(self._identities)


# The cache locks in C: there is no lock of ours that a fork could inherit locked.
@functools.lru_cache(_MAX_OPEN_COPIES)
def _open_copy(
    cache_dir: str | None,
    patiently: Callable[[Callable[[], Any]], Any] | None,
    url: str,
    name: str,
    num_bytes: int,
) -> TFRecordSource:
    """The records of the copy of a shard; its index is made when it is opened first."""
    advice = "name another folder by config.data.cache_dir"
    copy = functools.partial(cached_copy, url, name, num_bytes, cache_dir, advice)
    return TFRecordSource([patiently(copy) if patiently else copy()])


def open_label_records(
    kind: str,
    folder: str,
    records: ShardedRecords,
    key: str = "config.data.labels",
    *,
    cache_dir: str | None = None,
    patiently: Callable[[Callable[[], Any]], Any] | None = None,
) -> LabelRecords | None:
    """The labels of some records, after it is checked that they belong to them.

    No shard of labels is opened, and no record shard that a `dataset.index` describes.

    Args:
        kind: `LABELS` or `CLIP_EMBEDDINGS`.
        folder: path or URL, as `data_prep.label` has written it.
        records: to be labelled.
        key: of the config, for messages.
        cache_dir: gets the copies of shards in a store; None is a folder of this user in the
            system's temporary one.
        patiently: calls a function until a store answers; once where None.

    Returns:
        None where the folder has no labels of this kind.

    Raises:
        ValueError: a shard of labels is missing or was replaced, or a record shard has none.
    """
    found = read_labels_index(kind, folder, key)
    if found is None:
        return None
    _, described = found
    stated = [LabelShard(name, digest, tuple(row)) for name, digest, row in described["shards"]]
    where = f"{key}={folder}"
    shards = _match_shards(kind, stated, records, where)
    if is_remote(folder):  # in the form of listings
        system, path = open_system(folder)
        folder = system.unstrip_protocol(path)
    paths = [os.path.join(folder, kind, shard.name) for shard in shards]
    try:
        source = TFRecordSource(paths)
    except StorageError:
        raise
    except ValueError as error:
        raise ValueError(
            f"{where}: a shard of {kind} is missing or changed ({error}); {_ADVICE}"
        ) from error
    for path, count, expected in zip(
        paths, source.shard_lengths.tolist(), records.shard_lengths.tolist(), strict=True
    ):
        if count != expected:
            raise ValueError(
                f"{where}: {path} has {count} records, and the shard that it belongs to has "
                f"{expected}; {_ADVICE}"
            )
    open_copy = functools.partial(_open_copy, cache_dir, patiently)
    return LabelRecords(kind, source, shards, described["facts"], open_copy)


def _match_shards(
    kind: str, stated: Sequence[LabelShard], records: ShardedRecords, where: str
) -> list[LabelShard]:
    """The shard of labels of every record shard, in their order.

    Raises:
        ValueError: a record shard has none, or one of other records.
    """
    by_source = {shard.source: shard for shard in stated}
    others = {shard.source[0]: shard for shard in stated}
    matched = []
    advice = "label these records with `python -m data_prep.label`, or name the labels of theirs"
    for found, path in zip(fingerprint_records(records).shards, records.paths, strict=True):
        name, count, num_bytes, digest = found
        if tuple(found) in by_source:
            matched.append(by_source[found])
        elif name not in others:
            raise ValueError(f"{where}: no {kind} of the shard {path}; {advice}")
        else:
            other = others[name]
            _, other_count, other_bytes, other_digest = other.source
            raise ValueError(
                f"{where}: {kind}/{other.name} belongs to another shard than {path}: to "
                f"{other_count} records in {other_bytes} bytes with digest {other_digest}, and "
                f"there are {count} in {num_bytes} bytes with digest {digest}; {advice}"
            )
    return matched
