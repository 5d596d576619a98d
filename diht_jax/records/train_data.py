"""The training data of a run: the sources of `config.data.train`, held-out records, fingerprints.

Every checkpoint keeps a fingerprint of the data, which is compared when a run is resumed. A
position in the data is meaningless once the data have changed.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import hashlib
import itertools
import math
import os
import posixpath
import zlib
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from diht_jax.config.checks import suggest
from diht_jax.records.catalog import ShardsNotFoundError, describe_stale
from diht_jax.records.dataset_index import INDEX_NAME, read_index, rebuild_command
from diht_jax.records.formats import open_source
from diht_jax.records.sharded import ShardedRecords
from diht_jax.storage.files import is_glob, map_many
from diht_jax.storage.stores import is_remote

_CAPTION = "{caption}"
LABELS = "labels"
# Held-out record numbers of a source without any.
NO_RECORDS = np.zeros(0, np.int64)
# More shards than this in a store, without an index, give a warning.
_MANY_SHARDS = 16
_KEYS = ("path", "weight", "text_template", "order", "labels")
# Schedule of a weight: (first step, weight) pairs; the first step of all is 0.
Points = tuple[tuple[int, Fraction], ...]


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """One source of a mixture; None means the value in `config.data`."""

    name: str  # its key in `config.data.train`; "" for a single source
    path: str | list[str]  # argument of `open_records`
    weights: Points = ((0, Fraction(1)),)
    text_template: str | None = None  # for its captions
    order: str | None = None  # "global", "blocks" or "auto"
    # Output folder of `data_prep.label` with the labels of the records. None means that the records
    # have their own labels, if any.
    labels: str | None = None


def _check_is_set(train: Any) -> None:
    """Raises ValueError if `config.data.train` is empty."""
    if not train:
        raise ValueError(
            "config.data.train is not set: expected a directory, a glob or a list of record "
            "shards, such as --config.data.train=/data/kept (written by data_prep.filter)"
        )


def open_records(
    train: str | Sequence[str] | None, key: str = "config.data.train"
) -> ShardedRecords:
    """Opens the records of `config.data.train`: a directory, a glob, or a list of shards.

    `key` is the name of the config key in messages.

    Raises:
        ValueError: the key is not set, or matches no shards, shards of several formats, or a
            compressed tar.
    """
    _check_is_set(train)
    try:
        source = open_source(train or ())
    except ShardsNotFoundError as error:
        raise ValueError(f"{key}: {error}") from error
    unindexed = source.unindexed_urls
    if len(unindexed) > _MANY_SHARDS:
        logging.warning(
            f"no {INDEX_NAME} describes {len(unindexed)} shards, such as {unindexed[0]}: every "
            "process reads the size and the index of each of them; "
            f"`{rebuild_command(unindexed[0])}` writes one"
        )
    return source


def parse_train(train: Any, labels: str | None = None) -> list[TrainSource]:
    """Parses `config.data.train` into its sources.

    Args:
        train: a path, a list of paths, or a section for each source: `dict(laion=dict(path=...,
            weight=0.8), curated=dict(path=..., weight=0.2, text_template="a photo: {caption}",
            order="global"))`. A weight is a number, or a schedule such as ((0, 0.8), (10000, 0.5)):
            from step 10,000 on it is 0.5.

    Raises:
        ValueError: the value is missing or malformed; names the key as the user types it.
    """
    _check_is_set(train)
    if not hasattr(train, "keys"):
        return [TrainSource("", train if isinstance(train, str) else list(train), labels=labels)]
    sources = [_parse_source(name, train[name], labels) for name in train]
    for step, weights in join_weights([source.weights for source in sources]):
        if not any(weights):
            raise ValueError(f"config.data.train: all weights are 0 from step {step} on")
    for source in sources:
        if not any(weight for _, weight in source.weights):
            raise ValueError(
                f"config.data.train.{source.name}.weight=0: it is never used; leave the source out"
            )
    return sources


def describe_train(train: Any) -> str:
    """Returns `config.data.train` as text for a message."""
    if not hasattr(train, "keys"):
        return str(train)
    return ", ".join(f"{source.name}: {source.path}" for source in parse_train(train))


def join_weights(several: Sequence[Points]) -> list[tuple[int, list[Fraction]]]:
    """Joins several schedules: each step at which a weight changes, from 0, with all weights."""
    steps = sorted({step for points in several for step, _ in points})
    return [
        (step, [next(w for first, w in reversed(points) if first <= step) for points in several])
        for step in steps
    ]


def find_inputs(folder: str) -> list[str] | None:
    """Returns the paths of the records that a folder's labels belong to; None without labels."""
    index = read_index(os.path.join(folder, LABELS))
    if index is None or not index.labels:
        return None
    system, folder_there = _split(folder)
    return [
        text
        if is_remote(text) or os.path.isabs(text)
        else f"{system}{posixpath.normpath(posixpath.join(folder_there, text))}"
        for text in index.labels["inputs"]
    ]


def resolve_source(source: TrainSource) -> TrainSource:
    """Turns a source that is a folder of labels alone into the records that these belong to."""
    if source.labels or not isinstance(source.path, str):
        return source
    if is_remote(source.path) and is_glob(source.path):  # a local folder may have brackets
        return source
    inputs = find_inputs(source.path)
    return (
        source if inputs is None else dataclasses.replace(source, path=inputs, labels=source.path)
    )


def relative_input(path: str, folder: str) -> str:
    """Returns an input's path relative to the folder of the labels, if both are on one file system.

    This allows copying both to another place together.
    """
    (system, path_there), (own, folder_there) = _split(path), _split(folder)
    return posixpath.relpath(path_there, folder_there) if system == own else system + path_there


def _split(path: str) -> tuple[str, str]:
    """Splits a path or URL into its protocol ("" for a local path) and the absolute path."""
    if is_remote(path):
        system, _, rest = path.partition("://")
        return f"{system}://", rest
    return "", os.path.abspath(path)


def _parse_source(name: str, section: Any, labels: str | None) -> TrainSource:
    where = f"config.data.train.{name}"
    example = "a section such as dict(path='/data/kept', weight=0.8)"
    if not hasattr(section, "keys"):
        kind = type(section).__name__
        raise ValueError(f"{where}: expected {example}, got {kind} {section!r:.200}")
    for key in section:
        if key not in _KEYS:
            raise ValueError(f"{where}.{key}: no such key; {suggest(str(key), _KEYS)}")
    for key in ("path", "weight"):
        if section.get(key) is None:
            raise ValueError(f"{where}.{key} is not set: expected {example}")
    path, template, order, own_labels = (
        section.get(key) for key in ("path", "text_template", "order", "labels")
    )
    is_text = isinstance(path, str)
    paths = [path] if is_text else path
    is_list = isinstance(paths, list | tuple) and bool(paths)

    def check(key: str, is_right: bool, expected: str) -> None:
        if not is_right:
            raise ValueError(f"{where}.{key}={section[key]!r:.200}: {expected}")

    is_path = is_list and all(isinstance(p, str | os.PathLike) and os.fspath(p) for p in paths)
    check("path", is_path, "expected a directory, a glob or a list of shards")
    has_caption = template is None or (isinstance(template, str) and template.count(_CAPTION) == 1)
    check("text_template", has_caption, f"expected {_CAPTION} once")
    orders = (None, "auto", "global", "blocks")
    check("order", order in orders, "expected 'auto', 'global' or 'blocks'")
    is_folder = own_labels is None or (isinstance(own_labels, str) and own_labels != "")
    check("labels", is_folder, "expected a folder of `python -m data_prep.label`")
    return TrainSource(
        name,
        path if is_text else [os.fspath(part) for part in paths],
        parse_weights(f"{where}.weight", section["weight"]),
        template,
        order,
        own_labels or labels,
    )


def parse_weights(where: str, weight: Any) -> Points:
    """Parses a weight or a schedule of weights.

    Raises a ValueError for other forms; `where` is the key as the user types it.
    """
    if not isinstance(weight, list | tuple):
        return ((0, _parse_weight(where, weight)),)
    points = []
    for point in weight:
        is_pair = isinstance(point, list | tuple) and len(point) == 2
        if not is_pair or type(point[0]) is not int or point[0] < 0:
            raise ValueError(
                f"{where}={weight!r:.200}: expected a number, or pairs of a step and a weight such "
                "as ((0, 0.8), (10000, 0.5))"
            )
        points.append((point[0], _parse_weight(where, point[1])))
    steps = [step for step, _ in points]
    if steps[:1] != [0] or steps != sorted(set(steps)):
        raise ValueError(
            f"{where}={weight!r:.200}: expected steps that begin with 0 and become larger"
        )
    return tuple(points)


def _parse_weight(where: str, weight: Any) -> Fraction:
    is_number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight) or weight < 0:
        raise ValueError(f"{where}={weight!r:.200}: expected a finite number, at least 0")
    return Fraction(str(weight))  # exactly the typed decimal: 0.2 is 1/5


def held_out_records(records: Any, data: ml_collections.ConfigDict, seed: int) -> np.ndarray:
    """Returns the numbers of the records that `config.data.validation_share` holds out of a source.

    The choice depends only on `config.seed`, the name of the record's shard (without the folder)
    and its place in the shard. Shards may therefore be moved or added.

    Returns:
        int64, rising.

    Raises:
        ValueError: the share selects none or all of the records.
    """
    share = data.validation_share
    found, start = [NO_RECORDS], 0
    for path, length in zip(records.paths, map(int, records.shard_lengths), strict=True):
        bits = np.random.PCG64([seed, *os.fsencode(os.path.basename(path))]).random_raw(length)
        found.append(start + np.flatnonzero(bits < np.uint64(share * 2**64)))
        start += length
    held_out = np.concatenate(found)
    if not 0 < len(held_out) < start:
        raise ValueError(
            f"config.data.validation_share={share} holds out {len(held_out)} of the {start} "
            "records; expected a share that leaves some of both, or 0"
        )
    return held_out


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """A fingerprint of the shards of a data set, in order."""

    # Name (without folder), number of records, size in bytes, and a digest of 16 hex digits, for
    # every shard.
    shards: tuple[tuple[str, int, int, str], ...]

    @property
    def digest(self) -> str:
        """16 hex digits of a hash of all shards in their order."""
        return hashlib.sha256(_table(self.shards)).hexdigest()[:16]

    def pack(self) -> dict[str, int | str]:
        """Returns a JSON-able form of at most 30 bytes per shard."""
        table = base64.b85encode(zlib.compress(_table(self.shards), 9)).decode()
        return {"num_shards": len(self.shards), "digest": self.digest, "table": table}

    @classmethod
    def unpack(cls, packed: dict[str, int | str]) -> Fingerprint:
        """Inverts `pack`."""
        table = zlib.decompress(base64.b85decode(str(packed["table"])))
        rows = (line.rsplit("\t", 3) for line in os.fsdecode(table).split("\n")[:-1])
        return cls(tuple((name, int(n), int(size), digest) for name, n, size, digest in rows))


def fingerprint_records(source: ShardedRecords) -> Fingerprint:
    """Fingerprints all shards; a shard without `dataset.index` takes two small reads.

    A shard's digest covers where its records begin, hence their lengths, and its first and last
    4 KiB. It detects missing, new, renamed, reordered or rewritten shards. It does not detect a
    changed byte in the middle, which the records' checksums find when they are read. Shards equal
    to another one are logged.
    """
    shards, copies = [], []
    first: dict[tuple[int, int, str], str] = {}
    rows = map_many(source.identify, range(len(source.paths)))
    for path, row in zip(source.paths, rows, strict=True):
        shards.append((os.path.basename(path), *row))
        if row[0] and first.setdefault(row, path) != path:
            copies.append((path, first[row]))
    if copies:
        logging.warning(
            "%d shards look like copies of others, such as %s of %s: if a file was copied over "
            "another one, records are missing",
            len(copies),
            *copies[0],
        )
    return Fingerprint(tuple(shards))


def describe_changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """Describes in words how the current data differ from the fingerprint of a checkpoint."""
    if before == now:
        return []
    changes = describe_stale(_by_name(before), _by_name(now), is_whole=True)
    return changes or ["the same shards in another order"]


def _by_name(fingerprint: Fingerprint) -> dict[str, tuple[int, int, str]]:
    """Returns shards by name; the second of equal names in several folders becomes `NAME (2)`."""
    seen: collections.Counter[str] = collections.Counter()
    shards = {}
    for name, count, size, digest in fingerprint.shards:
        seen[name] += 1
        shards[name if seen[name] == 1 else f"{name} ({seen[name]})"] = count, size, digest
    return shards


def _table(shards: tuple[tuple[str, int, int, str], ...]) -> bytes:
    return os.fsencode("".join(itertools.starmap("{}\t{}\t{}\t{}\n".format, shards)))
