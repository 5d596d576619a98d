"""Which parts a folder has and in which order: named by their inputs, listed in `manifest.json`.

The name is a hash of the input's path below its root, so that it does not depend on the other
inputs: one that is added, removed or replaced concerns its own part alone. The manifest has a line
for each part, in the order of the inputs: what it is made of, and which names it had before. Parts
that were numbered, as all were once, and those whose input is now reached by another root are found
by the path that lies beside them, and are renamed.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from data_prep.jobs import fingerprint, shards
from data_prep.jobs.packed import PackedList
from data_prep.jobs.shards import STATS_SUFFIX, ShardTask
from diht_jax.readers.registry import SourceShard
from diht_jax.records.dataset_info import shard_name
from diht_jax.records.formats.registry import FORMATS
from diht_jax.storage import files
from diht_jax.storage.stores import is_remote

NAME = "manifest.json"

_VERSION = 1
_HEAD, _TAIL = f'{{"version": {_VERSION}, "parts": ['.encode(), b"]}"
# The path of an input, its kind, and the part of it.
_Unit = tuple[str, str, int, int | None]


class Input(NamedTuple):
    """One unit of work, and where it stands in what was typed.

    Attributes:
        shard: the unit.
        root: the folder part of the typed text before its first wildcard; of a folder itself.
    """

    shard: SourceShard
    root: str

    @property
    def path(self) -> str:
        """Path of the unit below the root, with "/" between the names."""
        path, root = _plain_path(self.shard.path), _plain_path(self.root)
        below = path.removeprefix(f"{root}/")
        # What a text such as tfds:NAME:SPLIT stands for lies elsewhere.
        return below if below != path else path.rpartition("/")[2]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A line of the manifest.

    Attributes:
        name: file name of the part.
        path: of its input, below the root.
        source: the whole path of the input, or its URL.
        kind, start, stop: as of `SourceShard`.
        size_bytes, changed: of the input when the job was planned; `changed` is a time, or the
            version that a store states.
        before: earlier names of the part.
    """

    name: str
    path: str
    source: str
    kind: str
    start: int
    stop: int | None
    size_bytes: int
    changed: int | str | None
    before: tuple[str, ...] = ()

    @property
    def unit(self) -> _Unit:
        """What it is made of."""
        return self.source, self.kind, self.start, self.stop


def plan_parts(
    inputs: Sequence[Input],
    folder: str,
    *,
    dataset: str,
    split: str,
    config_hash: str,
    output_format: str = "tfrecord",
    identity: str = "time",
) -> Sequence[ShardTask]:
    """Gives every input its part, makes the folder, and writes the manifest.

    Args:
        inputs: in order, which is that of the manifest.
        folder: of the parts.
        dataset: first part of the names.
        split: second part of the names.
        config_hash: see `shards.hash_config`.
        output_format: of the parts, one of `formats.registry.FORMATS`.
        identity: one of `fingerprint.IDENTITIES`.
    """
    files.make_folder(folder)
    suffix = FORMATS[output_format].suffix
    prefix = shard_name(dataset, split, 0, 1, "").removesuffix("00000")
    names = PackedList(f"{prefix}{found}{suffix}" for found in hash_inputs(inputs))
    numbered = re.compile(rf"{re.escape(prefix)}(\d{{5,9}}){re.escape(suffix)}")

    def may_be_other(name: str) -> bool:
        """Whether it is the manifest, a part's statistics, or belongs to a part with a number."""
        is_known = name == NAME or name.endswith(STATS_SUFFIX)
        return is_known or numbered.match(name.lstrip(".")) is not None

    others = set(files.list_names(folder, may_be_other))
    others.difference_update(name + STATS_SUFFIX for name in names)
    old = b""
    if NAME in others:
        others.remove(NAME)
        old = files.read_bytes(files.join(folder, NAME))
    before = {entry.name: entry.before for entry in _parse_manifest(old) if entry.before}
    if others:
        present = files.list_names(folder)
        moves = _find_moves(list(map(_describe, names, inputs)), folder, present, numbered)
        for old, new in moves.items():
            before[new] = tuple(dict.fromkeys((*before.get(new, ()), *before.get(old, ()), old)))
    data = _format_manifest(map(_describe, names, inputs), before)
    if data != old:
        files.write_bytes(files.join(folder, NAME), data)
    if others:
        if moves:
            _rename(folder, moves, present, suffix)
        for name in _half_done(present, numbered):
            files.remove(files.join(folder, name))
    return PackedList(
        ShardTask(found.shard, files.join(folder, name), config_hash, identity)
        for found, name in zip(inputs, names, strict=True)
    )


def hash_inputs(inputs: Sequence[Input]) -> list[str]:
    """16 hexadecimal digits for each input; they do not depend on the inputs of other paths.

    They stand for the path below the root, the kind, and the range where a file makes several
    units. Where two roots have an input of the same path, the last names of each root count too, as
    many as tell them apart.
    """
    units = collections.Counter(found.shard.path for found in inputs)
    several = {path for path, count in units.items() if count > 1}
    del units

    def describe(found: Input, *root: str) -> bytes:
        shard = found.shard
        part = [shard.start, shard.stop] if shard.path in several else []
        row = [found.path, shard.kind, *part, *root]
        return hashlib.blake2b(json.dumps(row).encode(), digest_size=8).digest()

    hashes = list(map(describe, inputs))
    counts = collections.Counter(hashes) if len(set(hashes)) < len(hashes) else {}
    alike: dict[bytes, list[int]] = collections.defaultdict(list)
    for number, found in enumerate(hashes):
        if counts.get(found, 1) > 1:
            alike[found].append(number)
    for numbers in alike.values():
        roots = _tell_apart([_plain_path(inputs[number].root) for number in numbers])
        for number, root in zip(numbers, roots, strict=True):
            hashes[number] = describe(inputs[number], root)
    return [found.hex() for found in hashes]


def read_manifest(folder: str) -> list[Entry]:
    """The entries in their order; none where the manifest is missing or damaged."""
    return list(iterate_manifest(folder))


def iterate_manifest(folder: str) -> Iterator[Entry]:
    """As `read_manifest`, one after the other: many are not held at once."""
    try:
        data = files.read_bytes(files.join(folder, NAME))
    except FileNotFoundError:
        return
    yield from _parse_manifest(data)


def _parse_manifest(data: bytes) -> Iterator[Entry]:
    head, *lines = data.splitlines() or [b""]
    if head != _HEAD or lines[-1:] != [_TAIL]:
        return
    for line in lines[:-1]:
        try:
            row = json.loads(line.removesuffix(b","))
            yield Entry(**row | {"before": tuple(row["before"])})
        except (ValueError, KeyError, TypeError):
            return


def earlier_names(folder: str) -> dict[str, str]:
    """Earlier name of a part -> its name now."""
    return {old: entry.name for entry in iterate_manifest(folder) for old in entry.before}


def _format_manifest(entries: Iterable[Entry], before: Mapping[str, tuple[str, ...]]) -> bytes:
    """One line for each part, for people and for tools that read lines.

    Args:
        entries: of all parts.
        before: earlier names of those that had others.
    """
    written = io.BytesIO()
    written.write(_HEAD)
    for number, entry in enumerate(entries):
        if entry.name in before:
            entry = dataclasses.replace(entry, before=before[entry.name])
        line = json.dumps(dataclasses.asdict(entry))
        written.write(f"{',' if number else ''}\n{line}".encode())
    written.write(b"\n" + _TAIL + b"\n")
    return written.getvalue()


def _describe(name: str, found: Input) -> Entry:
    shard, state = found.shard, found.shard.identity()
    part = (shard.kind, shard.start, shard.stop)
    return Entry(
        name, found.path, state["path"], *part, state["size_bytes"], state["changed_ns"]
    )  # fmt: skip


def _plain_path(path: str) -> str:
    """A path or URL in the one form in which they are compared."""
    if is_remote(path):
        return path.split("://", 1)[1].strip("/")
    return os.path.abspath(path).replace(os.sep, "/")


def _tell_apart(roots: Sequence[str]) -> list[str]:
    """The end of each root from which on they differ; of equal ones, a number behind it."""
    parts = [root.split("/") for root in roots]
    count, different = 1, len(set(roots))
    while len({tuple(part[-count:]) for part in parts}) < different:
        count += 1
    seen: collections.Counter[str] = collections.Counter()
    ends = []
    for root, part in zip(roots, parts, strict=True):
        # The same file may be named twice.
        ends.append("/".join(part[-count:]) + (f" {seen[root]}" if seen[root] else ""))
        seen[root] += 1
    return ends


def _find_moves(
    entries: Sequence[Entry], folder: str, present: Sequence[str], numbered: re.Pattern[str]
) -> dict[str, str]:
    """Parts that lie there under another name than they should: old name -> new name.

    Their input is known by its path, or, of a part with a number whose input was moved, by that
    number and the name and size of the input.
    """
    there = {name.removesuffix(STATS_SUFFIX) for name in present if name.endswith(STATS_SUFFIX)}
    others = sorted(there - {entry.name for entry in entries})
    missing = {entry.unit: entry for entry in entries if entry.name not in there}
    moves: dict[str, str] = {}
    for name in others if missing else ():
        task = ShardTask(SourceShard("", ""), files.join(folder, name), "")
        location, stats = fingerprint.read_location(task.location_path), shards.read_stats(task)
        if location is None or stats is None:
            continue
        made_of = stats.get("input") or {}
        part = (made_of.get("kind"), made_of.get("start"), made_of.get("stop"))
        entry = missing.get((location["path"], *part))
        match = numbered.fullmatch(name)
        if entry is None and match and int(match[1]) < len(entries):
            found = entries[int(match[1])]
            size, base = location["size_bytes"], os.path.basename(location["path"])
            if (found.size_bytes, os.path.basename(found.source), *found.unit[1:]) == (
                *(size, base),
                *part,
            ):
                entry = missing.get(found.unit)
        if entry is not None:
            moves[name] = missing.pop(entry.unit).name
    return moves


def _rename(folder: str, moves: Mapping[str, str], present: Sequence[str], suffix: str) -> None:
    """Renames the files of parts, the statistics last: until then the old name is the valid one."""
    logging.info("%s: %d parts are renamed after their inputs", folder, len(moves))
    for name in sorted(present, key=lambda name: name.endswith(STATS_SUFFIX)):
        stem, found, rest = name.partition(suffix)
        new = moves.get(stem + found)
        if new is not None:
            files.rename(files.join(folder, name), files.join(folder, new + rest))


def _half_done(present: Sequence[str], numbered: re.Pattern[str]) -> list[str]:
    """Files of parts with numbers that were not finished; no part gets such a name any more."""
    done = {name.removesuffix(STATS_SUFFIX) for name in present if name.endswith(STATS_SUFFIX)}
    found = ((name, numbered.match(name.lstrip("."))) for name in present)
    return [name for name, match in found if match and match[0] not in done]
