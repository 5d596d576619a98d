"""Shards of labels: TFRecord shards with one record for each record of a record shard.

A folder that `data_prep.label` writes has

    labels/NAME.tfrecord            concept labels of the shard NAME, record for record
    clip_embeddings/NAME.tfrecord   embeddings of CLIP teachers, likewise
    vocabulary_*.tsv                what the ids mean

Each of the two folders has an `.idx` for each shard, and a `dataset.index`. The JSON in the head of
that index states under `labels` which record shard each of them belongs to, by its name, number of
records, bytes and digest (`fingerprint.py`), so that labels of other records are noticed at the
start of a run, and the record shards may be anywhere. A label also holds a checksum of its
record's key, so that labels in another order are noticed when they are read.

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

from diht_jax.records.catalog import Share, has_shard_name
from diht_jax.records.dataset_index import INDEX_NAME, ShardTable, read_table
from diht_jax.records.fingerprint import fingerprint_records
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
        where: file and number, for messages.
    """

    data: bytes
    where: str


def label_shard_name(shard: str) -> str:
    """The file name of the labels of a record shard."""
    name = os.path.basename(shard)
    return name if has_shard_name(name) else f"{name}.tfrecord"


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
        stated = read_table(os.path.join(folder, LABELS, INDEX_NAME)).labels
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stated and [_find_input(text, folder) for text in stated["inputs"]]


def _find_input(text: str, folder: str) -> str:
    """The inverse of `relative_input`, also where the folder was moved."""
    if is_remote(text) or os.path.isabs(text):
        return text
    system, folder_there = _split(folder)
    return f"{system}{posixpath.normpath(posixpath.join(folder_there, text))}"


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


def read_labels_table(
    kind: str, folder: str, key: str = "config.data.labels", share: Share | None = None
) -> ShardTable | None:
    """The index of a folder of labels; None where there is none.

    Args:
        kind: `LABELS` or `CLIP_EMBEDDINGS`.
        folder: path or URL, as `data_prep.label` has written it.
        key: of the config, for messages.
        share: for a run of several processes, all of which call: the first one alone reads it.

    Raises:
        ValueError: it is damaged, or was not written by `data_prep.label`.
    """
    path = os.path.join(folder, kind, INDEX_NAME)

    def read() -> bytes:
        try:
            return read_table(path).head
        except (FileNotFoundError, NotADirectoryError):
            return b""

    head = share(read) if share else read()
    table = ShardTable(head, path) if head else None
    if table is not None and table.labels is None:
        raise ValueError(
            f"{key}={folder}: {kind}/{INDEX_NAME} does not state which records the {kind} belong "
            "to; run `python -m data_prep.label` again"
        )
    return table


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
        cache_dir: str | None = None,
        patiently: Callable[[Callable[[], Any]], Any] | None = None,
    ):
        """Reads no label yet.

        Args:
            kind: `LABELS` or `CLIP_EMBEDDINGS`.
            records: the shards of labels, in the order of the record shards.
            shards: likewise.
            facts: of `describe_labels`.
            cache_dir: gets the copies of shards in a store; None is a folder of this user in the
                system's temporary one.
            patiently: calls a function until a store answers; once where None.
        """
        self.kind = kind
        self.facts = facts
        self._records = records
        self._shards = {
            path: (shard, size)
            for path, shard, (_, _, size, _) in zip(
                records.paths, shards, fingerprint_records(records).shards, strict=True
            )
        }
        self._cache_dir = cache_dir
        self._patiently = patiently
        self._reset_copies()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Label:
        """The label of a record.

        Raises:
            TFRecordError: it is damaged, or its shard was replaced.
        """
        path, number = self._records.locate(index)
        if not is_remote(path):
            return Label(self._records[index], f"{path}: record {number}")
        return Label(self._open_copy(path)[number], f"{path}: record {number}")

    def fingerprint(self) -> tuple[ShardIdentity, ...]:
        """Rows of a `Fingerprint` for the shards of labels."""
        rows = fingerprint_records(self._records).shards
        return tuple(
            (f"{self.kind}/{name}", count, size, shard.digest)
            for (name, count, size, _), (shard, _) in zip(rows, self._shards.values(), strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open_copy"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset_copies()

    def _reset_copies(self) -> None:
        # The cache locks in C: there is no lock of ours that a fork could inherit locked. It must
        # not refer to this object: as a cycle, it would keep files open for long.
        self._open_copy = functools.lru_cache(_MAX_OPEN_COPIES)(
            functools.partial(_open_copy, self._shards, self._cache_dir, self._patiently)
        )


def _open_copy(
    shards: Mapping[str, tuple[LabelShard, int]],
    cache_dir: str | None,
    patiently: Callable[[Callable[[], Any]], Any] | None,
    url: str,
) -> TFRecordSource:
    """The records of the copy of a shard; its index is made when it is opened first."""
    shard, size = shards[url]
    copy = functools.partial(
        cached_copy,
        url,
        f"{shard.digest}-{shard.name}",
        size,
        cache_dir,
        "name another folder by config.data.cache_dir",
    )
    return TFRecordSource([patiently(copy) if patiently else copy()])


def open_label_records(
    kind: str,
    folder: str,
    records: ShardedRecords,
    key: str = "config.data.labels",
    *,
    share: Share | None = None,
    cache_dir: str | None = None,
    patiently: Callable[[Callable[[], Any]], Any] | None = None,
    make: type[LabelRecords] = LabelRecords,
) -> LabelRecords | None:
    """The labels of some records, after it is checked that they belong to them.

    No shard of labels is opened, and no record shard that a `dataset.index` describes.

    Args:
        kind: `LABELS` or `CLIP_EMBEDDINGS`.
        folder: path or URL, as `data_prep.label` has written it.
        records: to be labelled.
        key: of the config, for messages.
        share: for a run of several processes, all of which call: the first one alone reads the
            folder.
        cache_dir: gets the copies of shards in a store; see `LabelRecords`.
        patiently: calls a function until a store answers; once where None.
        make: class of the result.

    Returns:
        None where the folder has no labels of this kind.

    Raises:
        ValueError: a shard of labels is missing or was replaced, or a record shard has none.
    """
    table = read_labels_table(kind, folder, key, share)
    if table is None:
        return None
    stated = [LabelShard(name, digest, tuple(row)) for name, digest, row in table.labels["shards"]]
    where = f"{key}={folder}"
    shards = _match_shards(kind, stated, records, where)
    if is_remote(folder):  # in the form of listings
        system, path = open_system(folder)
        folder = system.unstrip_protocol(path)
    paths = [os.path.join(folder, kind, shard.name) for shard in shards]
    try:
        source = TFRecordSource(paths, share=share)
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
    return make(kind, source, shards, table.labels["facts"], cache_dir, patiently)


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
