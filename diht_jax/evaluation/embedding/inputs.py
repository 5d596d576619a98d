"""The sources of pictures to embed or search, and their division among processes.

A part is a run of consecutive entries of a shard. It is the unit of work of `diht_jax.embed` and of
an index, and the most that an interruption can lose.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diht_jax.evaluation.embedding.entries import Entry, Unit, Units, divide
from diht_jax.evaluation.sources.registry import count_shards
from diht_jax.readers import image_folder, registry
from diht_jax.readers.base import SourceShard
from diht_jax.readers.image_folder import FolderLayoutError
from diht_jax.terminal import ProgressBar

# Kind of a folder that only has pictures. Without captions it is no source of pairs for any other
# purpose.
PICTURES = "pictures"


def list_inputs(source: str | Sequence[str], *, needs_caption: bool = True) -> list[SourceShard]:
    """Lists the shards of a source; a folder with pictures, even among other files, is one."""
    names, pictures = set(), set()
    if is_folder := isinstance(source, str) and os.path.isdir(source):
        files = filter(os.path.isfile, os.scandir(source))
        names = {entry.name for entry in files if not entry.name.startswith(".")}
        listed = image_folder.list_pictures(source)
        pictures = {os.path.basename(path) for path, _, reason in listed if reason is None}
        if names and names <= pictures:
            return [SourceShard(PICTURES, source, needs_caption=needs_caption)]
    try:
        shards = registry.list_shards(source)
    except ValueError as error:
        # Pictures at any depth can be embedded: their folders need not be classes.
        if not (names & pictures or (is_folder and isinstance(error, FolderLayoutError))):
            raise
        shards = [SourceShard(PICTURES, str(source))]
    return [dataclasses.replace(shard, needs_caption=needs_caption) for shard in shards]


def refuse_unusable(source: str, dropped: Mapping[str, int]) -> None:
    """Raises ValueError for a source (its flag and value) without any usable entry."""
    if dropped:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items()))
        raise ValueError(
            f"{source}: nothing in it can be used; all {sum(dropped.values()):,} entries were left "
            f"out: {reasons}"
        )


class ShardParts(NamedTuple):
    """The parts of a shard that one process makes: every `step`-th, starting at `first`."""

    number: int  # of the shard in its source
    shard: SourceShard
    first: int
    step: int


def shares_of(shards: Sequence[SourceShard], index: int, count: int) -> list[ShardParts]:
    """Returns the share of process `index` of `count`: every `count`-th shard.

    A folder of pictures is divided among all processes; so is a file if there are fewer shards than
    processes. Each of them reads the whole file, but decodes and embeds only its own parts.
    """
    shares = []
    for number, shard in enumerate(shards):
        sharing = range(number % count, count, len(shards))
        if shard.kind == PICTURES:
            sharing = range(count)
        if index in sharing:
            shares.append(ShardParts(number, shard, sharing.index(index), len(sharing)))
    return shares


def input_units(shards: Sequence[SourceShard]) -> Units:
    """Divides a source into units that can be read independently; a folder has several."""
    units: list[Unit] = []
    for shard in shards:
        if shard.kind != PICTURES:
            units.append(functools.partial(registry.read_pairs, shard))
            continue
        read = functools.partial(image_folder.read_listed, shard.path)
        units += divide(list(image_folder.list_pictures(shard.path)), read)
    return Units(units, functools.partial(count_shards, shards))


@contextlib.contextmanager
def entries_bar(shards: Sequence[SourceShard]) -> Generator[ProgressBar]:
    """Shows progress over the entries of all shards; the total may be an estimate."""
    with ProgressBar(unit="pair", dynamic_ncols=True, total=count_shards(shards)) as bar:
        yield bar
        bar.total = bar.n
        bar.refresh()


def make_parts(
    share: ShardParts,
    size: int,
    find: Callable[[int], dict[str, Any] | None],
    make: Callable[[int, Iterator[Entry], Callable[[], bool]], dict[str, Any]],
    bar: ProgressBar,
) -> Iterator[dict[str, Any]]:
    """Yields the manifests of a process's parts of a shard; makes the missing parts.

    Args:
        share: the parts.
        size: entries per part.
        find: maps a part number to its manifest, which has "entries" and "is_last"; None if it is
            missing.
        make: makes a part from its number, its entries, and a function that tells, after they are
            consumed, whether they were the last of the shard; returns the manifest.
        bar: progress bar over the entries.
    """
    shard, position = share.shard, 0
    is_folder = shard.kind == PICTURES  # skipped pictures of a folder are not opened
    items: Iterator[Any] | None = None

    def is_last() -> bool:
        nonlocal items
        assert items is not None
        ahead = list(itertools.islice(items, 1))
        items = itertools.chain(ahead, items)
        return not ahead

    for part in itertools.count():
        manifest, is_own = find(part), part % share.step == share.first
        if is_own and manifest is not None:
            bar.update(manifest["entries"])
        elif is_own:
            if items is None:
                # For a folder these are names, which `read_listed` still has to read.
                list_pictures, path = image_folder.list_pictures, shard.path
                items = list_pictures(path) if is_folder else registry.read_pairs(shard)
            collections.deque(itertools.islice(items, part * size - position), maxlen=0)
            position = (part + 1) * size
            if part and is_last():
                return  # the last part belongs to another process, which has not finished it
            chunk: Iterator[Any] = itertools.islice(items, size)
            entries = image_folder.read_listed(shard.path, chunk) if is_folder else chunk
            manifest = make(part, counted(entries, bar), is_last)
        if is_own and manifest is not None:
            yield manifest
        if manifest is not None and manifest["is_last"]:
            return


def counted(entries: Iterable[Entry], bar: ProgressBar) -> Iterator[Entry]:
    """Yields the entries, advancing the bar by each one taken."""
    for entry in entries:
        bar.update()
        yield entry
