"""The training data of a run: the sources of `config.data.train`, what they hold out and look like.

A fingerprint is kept in every checkpoint and compared when a run is resumed: the position in the
data means nothing once the data are others.
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
# Numbers of records of which none is held out.
NO_RECORDS = np.zeros(0, np.int64)
# From this many shards in a store on, an index pays.
_MANY_SHARDS = 16
_KEYS = ("path", "weight", "text_template", "order", "labels")
# Of a weight: step from which on it holds, and the weight; the first step is 0.
Points = tuple[tuple[int, Fraction], ...]


@dataclasses.dataclass(frozen=True)
class TrainSource:
    """One source of a mixture; values that are None are those of `config.data`."""

    name: str  # its key in `config.data.train`; "" of the only one
    path: str | list[str]  # as `open_records` takes it
    weights: Points = ((0, Fraction(1)),)
    text_template: str | None = None  # of its captions
    order: str | None = None  # "global", "blocks" or "auto"
    # Folder of `data_prep.label` with the labels of its records; None where the records have them,
    # if any.
    labels: str | None = None


def _check_is_set(train: Any) -> None:
    """Raises ValueError where `config.data.train` is empty."""
    if not train:
        raise ValueError(
            "config.data.train is not set: expected a directory, a glob or a list of record "
            "shards, such as --config.data.train=/data/kept (written by data_prep.filter)"
        )


def open_records(
    train: str | Sequence[str] | None, key: str = "config.data.train"
) -> ShardedRecords:
    """The records of `config.data.train`: a directory, a glob, or a list of shards.

    `key` names it in messages.

    Raises:
        ValueError: it is not set, or leads to no shards, to those of several formats, or to a
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
    """The sources of `config.data.train`.

    Args:
        train: a path, a list of paths, or a section for each source: `dict(laion=dict(path=...,
            weight=0.8), curated=dict(path=..., weight=0.2, text_template="a photo: {caption}",
            order="global"))`. A weight is a number, or a schedule such as ((0, 0.8), (10000, 0.5)):
            from step 10,000 on it is 0.5.

    Raises:
        ValueError: it is not set, or not of this form; names the key as it is typed.
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
    """`config.data.train` in a message."""
    if not hasattr(train, "keys"):
        return str(train)
    return ", ".join(f"{source.name}: {source.path}" for source in parse_train(train))


def join_weights(several: Sequence[Points]) -> list[tuple[int, list[Fraction]]]:
    """The steps from which on any weights are others, from 0, and all weights then."""
    steps = sorted({step for points in several for step, _ in points})
    return [
        (step, [next(w for first, w in reversed(points) if first <= step) for points in several])
        for step in steps
    ]


def find_inputs(folder: str) -> list[str] | None:
    """Paths of the records that the labels in a folder belong to; None where it has no labels."""
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
    """A source whose path is a folder of labels alone, as the records that these belong to."""
    if source.labels or not isinstance(source.path, str):
        return source
    if is_remote(source.path) and is_glob(source.path):  # a local folder may have brackets
        return source
    inputs = find_inputs(source.path)
    return (
        source if inputs is None else dataclasses.replace(source, path=inputs, labels=source.path)
    )


def relative_input(path: str, folder: str) -> str:
    """An input as seen from the folder of the labels, if they are in one file system.

    Both may then be copied elsewhere together.
    """
    (system, path_there), (own, folder_there) = _split(path), _split(folder)
    return posixpath.relpath(path_there, folder_there) if system == own else system + path_there


def _split(path: str) -> tuple[str, str]:
    """The protocol of a URL, or nothing, and the absolute path behind it."""
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
    """A weight, or a schedule of weights.

    Other forms are a ValueError that names `where`, the key as it is typed.
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
    return Fraction(str(weight))  # 0.2 is a fifth, as it was typed


def held_out_records(records: Any, data: ml_collections.ConfigDict, seed: int) -> np.ndarray:
    """Numbers of the records of a source that `config.data.validation_share` holds out.

    Whether a record is held out is a function of `config.seed`, the name of its shard (without the
    folder) and its place there alone, so that shards may be moved or added.

    Returns:
        int64, rising.

    Raises:
        ValueError: the share is of so few records that it is none of them, or all.
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
    """The shards of a data set, in their order."""

    # Name (without folder), number of records, size in bytes, and a digest of 16 hex digits, for
    # every shard.
    shards: tuple[tuple[str, int, int, str], ...]

    @property
    def digest(self) -> str:
        """16 hex digits over all shards and their order."""
        return hashlib.sha256(_table(self.shards)).hexdigest()[:16]

    def pack(self) -> dict[str, int | str]:
        """A JSON-able form; 30 bytes a shard or less."""
        table = base64.b85encode(zlib.compress(_table(self.shards), 9)).decode()
        return {"num_shards": len(self.shards), "digest": self.digest, "table": table}

    @classmethod
    def unpack(cls, packed: dict[str, int | str]) -> Fingerprint:
        """The inverse of `pack`."""
        table = zlib.decompress(base64.b85decode(str(packed["table"])))
        rows = (line.rsplit("\t", 3) for line in os.fsdecode(table).split("\n")[:-1])
        return cls(tuple((name, int(n), int(size), digest) for name, n, size, digest in rows))


def fingerprint_records(source: ShardedRecords) -> Fingerprint:
    """Looks at every shard that no `dataset.index` describes: two small reads each.

    A shard's digest covers where its records begin, hence the length of each of them, and its first
    and last 4 KiB. So it notices shards that are missing, new, renamed, in another order, or
    written again with other records, but not a changed byte in the middle; the records' checksums
    find that when they are read. Shards that are equal to another one are logged.
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
    """The differences between the fingerprint of a checkpoint and that of now, in words."""
    if before == now:
        return []
    changes = describe_stale(_by_name(before), _by_name(now), is_whole=True)
    return changes or ["the same shards in another order"]


def _by_name(fingerprint: Fingerprint) -> dict[str, tuple[int, int, str]]:
    """Shards by name; of equal names in several folders, the second becomes `NAME (2)`."""
    seen: collections.Counter[str] = collections.Counter()
    shards = {}
    for name, count, size, digest in fingerprint.shards:
        seen[name] += 1
        shards[name if seen[name] == 1 else f"{name} ({seen[name]})"] = count, size, digest
    return shards


def _table(shards: tuple[tuple[str, int, int, str], ...]) -> bytes:
    return os.fsencode("".join(itertools.starmap("{}\t{}\t{}\t{}\n".format, shards)))
