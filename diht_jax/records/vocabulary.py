"""The vocabularies of concept distillation: the object or attribute that each id stands for.

They are files in the folder of the labelled shards and determine the sizes of the student's heads.
Code that selects concepts belongs in `data_prep.labelling.examples`. Each kind has one file, which
people can read as well::

    # objects 0f3a5c... 312 concepts 5d41402a
    id<TAB>concept<TAB>count
    0<TAB>man<TAB>5120

The hash covers the kind and the concepts in the order of their ids, but not the counts. Data sets
with the same hash agree on the meaning of every id. The last number of the first line is the CRC32C
of all other lines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import google_crc32c

from diht_jax.records.catalog import find_shards
from diht_jax.records.dataset_index import INDEX_NAME, read_index
from diht_jax.records.dataset_info import STATS_SUFFIX
from diht_jax.records.formats import open_source
from diht_jax.records.labels.shards import read_labels_index
from diht_jax.records.shard_files import DamagedRecordError
from diht_jax.records.train_data import LABELS, parse_train, resolve_source
from diht_jax.storage.files import exists, map_many, parse_checked_object, read_bytes, write_bytes

KINDS = ("objects", "attributes")
# Key in the statistics of a labelled shard, under "counts".
STATS_KEY = "vocabulary"

_COLUMNS = "id\tconcept\tcount"


@dataclasses.dataclass(frozen=True)
class ConceptList:
    """The concepts of one kind."""

    kind: str  # one of `KINDS`
    names: tuple[str, ...]  # concepts by id
    counts: tuple[int, ...]  # number of pairs that mention each concept

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def hash(self) -> str:
        """16 hexadecimal digits; equal for equal meanings of the ids."""
        text = "\n".join((self.kind, *self.names))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The vocabularies of objects and attributes."""

    objects: ConceptList
    attributes: ConceptList

    def __iter__(self):
        return iter((self.objects, self.attributes))

    def describe(self) -> dict[str, dict[str, Any]]:
        """Returns kind -> size and hash, JSON-able, as stored in shards and checkpoints."""
        return {part.kind: {"size": len(part), "hash": part.hash} for part in self}


def vocabulary_path(folder: str | os.PathLike[str], kind: str) -> str:
    """Returns the path of a vocabulary file in a labelled folder, which may be a URL."""
    return os.path.join(folder, f"vocabulary_{kind}.tsv")


def encode_concepts(part: ConceptList) -> bytes:
    """Returns the file contents of one kind; ValueError for a concept that cannot be stored."""
    for name in part.names:
        if not name or "\t" in name or len(name.splitlines()) != 1 or name != name.strip():
            raise ValueError(f"{part.kind}: {name!r} cannot be kept as a concept in one line")
    rows = zip(part.names, part.counts, strict=True)
    lines = [_COLUMNS, *(f"{i}\t{name}\t{count}" for i, (name, count) in enumerate(rows))]
    table = "\n".join(lines) + "\n"
    return f"# {part.kind} {part.hash} {len(part)} concepts {_checksum(table)}\n{table}".encode()


def _checksum(table: str) -> str:
    return f"{google_crc32c.value(table.encode()):08x}"


def write_vocabulary(folder: str | os.PathLike[str], vocabulary: Vocabulary) -> None:
    """Writes both files into an existing folder; errors are those of `encode_concepts`."""
    for part in vocabulary:
        write_bytes(vocabulary_path(folder, part.kind), encode_concepts(part))


def read_vocabulary(folder: str | os.PathLike[str]) -> Vocabulary:
    """Reads both files of a folder.

    Raises:
        ValueError: a file is missing or damaged, or does not match the hash in its first line.
    """
    return Vocabulary(*(_read_concepts(vocabulary_path(folder, kind), kind) for kind in KINDS))


def find_vocabulary(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
) -> Vocabulary | None:
    """Returns the vocabulary that the records of a data set are labelled with; None if unlabelled.

    Every shard in a labelled folder is checked against the folder's vocabulary, by the hashes in
    its statistics. All labelled folders are checked against each other. Folders without labels may
    be among them. `paths` are those of `TFRecordSource`.

    Raises:
        ValueError: two vocabularies differ (the error names both), or a file is missing.
    """
    by_folder: dict[str, list[str]] = {}
    for shard in find_shards(paths):
        by_folder.setdefault(os.path.dirname(shard) or ".", []).append(shard)
    found = []
    for folder, shards in by_folder.items():
        index = read_index(folder)
        known = None if index is None else index.vocabulary
        found.append((folder, folder_vocabulary(folder, shards, known)))
    return _shared_vocabulary(found)


def find_train_vocabulary(train: Any, labels: str | None = None) -> Vocabulary | None:
    """Returns the vocabulary of `config.data.train`, whose sources may have several formats.

    Raises:
        ValueError: as `find_vocabulary`, also for sources that differ.
    """
    found: list[tuple[str, Vocabulary | None]] = []
    without: list[str] = []
    for source in map(resolve_source, parse_train(train, labels)):
        if not source.labels:
            found.append((str(source.path), find_vocabulary(source.path)))
            without += find_shards(source.path)[:1] if found[-1][1] is None else []
            continue
        index = read_labels_index(LABELS, source.labels)
        assert index is not None
        vocabulary = read_vocabulary(source.labels)
        _check_files(index.vocabulary or {}, vocabulary, index.path, source.labels)
        found.append((source.labels, vocabulary))
    shared = _shared_vocabulary(found)
    for shard in filter(_has_concepts, without if shared else ()):
        raise ValueError(
            f"{shard}: its records have ids of concepts, and no vocabulary in their folder says "
            "that they mean those of the other sources; copy the vocabulary files and the "
            "statistics of the shards as well, or label them with `python -m data_prep.label`"
        )
    return shared


def _has_concepts(shard: str) -> bool:
    """Returns whether the first record of a shard has concept ids."""
    with contextlib.suppress(DamagedRecordError):
        records = open_source([shard])
        return bool(len(records)) and records.decode(records[0]).object_ids is not None
    return False


def _shared_vocabulary(found: Iterable[tuple[str, Vocabulary | None]]) -> Vocabulary | None:
    """Returns the common vocabulary of several places; None if no place has one."""
    first: tuple[str, Vocabulary] | None = None
    for where, vocabulary in found:
        if vocabulary is not None:
            first = first or (where, vocabulary)
            check_vocabulary(vocabulary.describe(), first[1].describe(), where, first[0])
    return first[1] if first else None


def check_vocabulary(
    found: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, Mapping[str, Any]],
    found_in: str,
    expected_in: str,
) -> None:
    """Compares two results of `Vocabulary.describe`, such as those of shards and of a checkpoint.

    Raises:
        ValueError: they differ; names the kinds and both places.
    """

    def describe(description: Any, kind: str) -> str:
        part = description.get(kind) if isinstance(description, Mapping) else None
        if not isinstance(part, Mapping) or not {"size", "hash"} <= part.keys():
            return "absent"  # a file may state anything
        return f"{part['size']} with hash {part['hash']}"

    both = {kind: (describe(found, kind), describe(expected, kind)) for kind in KINDS}
    wrong = [
        f"the {kind} of '{found_in}' are {here}, those of '{expected_in}' are {there}"
        for kind, (here, there) in both.items()
        if here != there or here == "absent"
    ]
    if wrong:
        raise ValueError(
            f"concept vocabularies differ: {'; '.join(wrong)}. Ids would mean other concepts: use "
            "data labelled with the same vocabulary (config.heads.load of data_prep.label takes "
            "over another folder's)"
        )


def folder_vocabulary(
    folder: str,
    shards: Sequence[str],
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> Vocabulary | None:
    """Returns the vocabulary shared by all shards of a folder; None if no shard is labelled.

    Args:
        known: vocabulary of all shards as stated in the `dataset.index`. None reads the statistics
            of every shard.

    Raises:
        ValueError: see `find_vocabulary`.
    """
    present = [exists(vocabulary_path(folder, kind)) for kind in KINDS]
    if not any(present):
        # Checking one shard is enough, since one run labels a whole folder.
        if _read_label(shards[0]):
            raise ValueError(
                f"'{shards[0]}' is labelled, but {vocabulary_path(folder, KINDS[0])} is missing; "
                "copy the vocabulary files together with the shards"
            )
        return None
    vocabulary = read_vocabulary(folder)
    if known is not None:
        index_path = os.path.join(folder, INDEX_NAME)
        _check_files(known, vocabulary, index_path, folder)
        return vocabulary
    for shard, label in zip(shards, map_many(_read_label, shards), strict=True):
        if label is None:
            raise ValueError(
                f"{shard}{STATS_SUFFIX}: names no vocabulary, though the folder has one; the shard "
                "was not written by `python -m data_prep.label`, or its statistics were not copied"
            )
        _check_files(label, vocabulary, shard + STATS_SUFFIX, folder)
    return vocabulary


def _check_files(stated: Any, vocabulary: Vocabulary, stated_in: str, folder: str) -> None:
    """Compares a stated description with a folder's files; errors as in `check_vocabulary`."""
    paths = " and ".join(vocabulary_path(folder, kind) for kind in KINDS)
    check_vocabulary(stated, vocabulary.describe(), stated_in, paths)


def _read_label(shard: str) -> Any:
    """Returns the vocabulary stated in the statistics of a shard; None if there is none."""
    try:
        return (parse_checked_object(read_bytes(shard + STATS_SUFFIX)) or {})["counts"].get(
            STATS_KEY
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{shard}{STATS_SUFFIX}: not the statistics of a shard") from error


def _read_concepts(path: str, kind: str) -> ConceptList:
    try:
        first, _, table = read_bytes(path).decode("utf-8").partition("\n")
        _, found_kind, expected_hash, _, _, checksum = first.split(" ")
        columns, *lines = table.split("\n")
        rows = [line.split("\t") for line in lines if line]
        in_order = [int(row[0]) for row in rows] == list(range(len(rows)))
        names = tuple(name for _, name, _ in rows)
        counts = tuple(int(count) for _, _, count in rows)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path} is missing; expected a folder of `python -m data_prep.label`"
        ) from error
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path}: not a vocabulary of `python -m data_prep.label`") from error
    found = ConceptList(kind, names, counts)
    is_whole = columns == _COLUMNS and in_order and checksum == _checksum(table)
    if found_kind != kind or not is_whole or found.hash != expected_hash:
        raise ValueError(
            f"{path}: {len(found)} {kind} with hash {found.hash}, while its first line states "
            f"{first!r:.200}; the file was changed after it was written. Take the original: the "
            "records' ids are indices into it"
        )
    return found
