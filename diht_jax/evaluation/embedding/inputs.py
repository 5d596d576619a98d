"""The sources of pictures that are embedded or searched, and how processes divide them.

A part is a run of consecutive entries of a shard: the unit of work of `diht_jax.embed` and of an
index, and what an interruption can cost.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from diht_jax.evaluation.embedding.entries import Entry, Unit
from diht_jax.evaluation.sources.registry import count_shards
from diht_jax.readers import image_folder, registry
from diht_jax.readers.base import SourceShard
from diht_jax.readers.image_folder import FolderLayoutError
from diht_jax.terminal import ProgressBar

# Kind of a folder that holds pictures and nothing else; without captions, it is no source of pairs
# for any other purpose.
PICTURES = "pictures"
# Few enough that processes can share a small folder.
_PICTURES_PER_UNIT = 64


def list_inputs(
    source: str | Sequence[str], *, needs_caption: bool = True, **source_options: Any
) -> list[SourceShard]:
    """Lists the shards of a source; a folder of pictures, even among other files, is one.

    Args:
        source: of `readers.list_shards`, or a folder of pictures.
        needs_caption: see `SourceShard.needs_caption`.
        **source_options: of `readers.list_shards`.
    """
    shards = _list_inputs(source, source_options)
    return [dataclasses.replace(shard, needs_caption=needs_caption) for shard in shards]


def _list_inputs(source: str | Sequence[str], source_options: dict[str, Any]) -> list[SourceShard]:
    if not isinstance(source, str) or not os.path.isdir(source):
        return registry.list_shards(source, **source_options)
    names = {e.name for e in os.scandir(source) if not e.name.startswith(".") and os.path.isfile(e)}
    listed = image_folder.list_pictures(source)
    pictures = {os.path.basename(path) for path, _, reason in listed if reason is None}
    if names and names <= pictures:
        return [SourceShard(PICTURES, source)]
    try:
        return registry.list_shards(source, **source_options)
    except ValueError as error:
        # Pictures at any depth can be embedded: the folders above them need not be classes.
        if names & pictures or isinstance(error, FolderLayoutError):
            return [SourceShard(PICTURES, source)]
        raise


def refuse_unusable(source: str, dropped: Mapping[str, int]) -> None:
    """Raises ValueError for a source of which every entry was left out.

    Args:
        source: the flag and its value.
        dropped: reason -> entries; none of an empty source.
    """
    if dropped:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items()))
        raise ValueError(
            f"{source}: nothing in it can be used; all {sum(dropped.values()):,} entries were left "
            f"out: {reasons}"
        )


class ShardParts(NamedTuple):
    """The parts of a shard that one of several processes makes: every `step`-th from `first` on."""

    number: int  # of the shard in its source
    shard: SourceShard
    first: int
    step: int


def shares_of(shards: Sequence[SourceShard], index: int, count: int) -> list[ShardParts]:
    """The share of process `index` of `count`: every `count`-th shard.

    A folder of pictures is divided by all; a file where there are fewer shards than processes. Each
    of those reads through the file, and decodes and embeds its own parts only.
    """
    shares = []
    for number, shard in enumerate(shards):
        sharing = range(number % count, count, len(shards))
        if shard.kind == PICTURES:
            sharing = range(count)
        if index in sharing:
            shares.append(ShardParts(number, shard, sharing.index(index), len(sharing)))
    return shares


def input_units(shards: Sequence[SourceShard]) -> list[Unit]:
    """Divides a source into parts that can be read on their own; several of a folder."""
    units: list[Unit] = []
    for shard in shards:
        if shard.kind != PICTURES:
            units.append(functools.partial(registry.read_pairs, shard))
            continue
        listed = list(image_folder.list_pictures(shard.path))
        units += [
            functools.partial(
                image_folder.read_listed, shard.path, listed[start : start + _PICTURES_PER_UNIT]
            )
            for start in range(0, len(listed), _PICTURES_PER_UNIT)
        ]
    return units


@contextlib.contextmanager
def entries_bar(shards: Sequence[SourceShard]) -> Generator[ProgressBar]:
    """A bar over the entries of all shards; their number may be an estimate until the end."""
    with ProgressBar(unit="pair", dynamic_ncols=True, total=count_shards(shards)) as bar:
        yield bar
        bar.total = bar.n
        bar.refresh()


class ShardReader(Iterator[Entry]):
    """Reads a shard forwards; pictures of a folder that are skipped stay closed."""

    def __init__(self, shard: SourceShard, listed: Iterable[Any] | None = None):
        """Opens a shard before its first entry.

        Args:
            shard: the shard.
            listed: of a folder of pictures, those to read, of `image_folder.list_pictures`; all by
                default.
        """
        self._folder = shard.path if shard.kind == PICTURES else None
        if self._folder is None:
            listed = registry.read_pairs(shard)
        elif listed is None:
            listed = image_folder.list_pictures(shard.path)
        self._items: Iterator[Any] = iter(listed)
        self._position = 0

    def __next__(self) -> Entry:
        item = next(self._items)
        self._position += 1
        if self._folder is None:
            return item
        return next(image_folder.read_listed(self._folder, [item]))

    def seek(self, position: int) -> bool:
        """Goes forwards to an entry by its number; returns whether there is one."""
        for _ in itertools.islice(self._items, position - self._position):
            pass
        self._position = max(position, self._position)
        return not self.is_exhausted()

    def is_exhausted(self) -> bool:
        """Tells whether no entry is left."""
        for item in self._items:
            self._items = itertools.chain([item], self._items)
            return False
        return True


class PartEntries(Iterator[Entry]):
    """The next entries of a shard, up to a number of them.

    Attributes:
        count: entries that were taken so far.
    """

    def __init__(self, reader: ShardReader, size: int, bar: ProgressBar):
        """Takes up to `size` entries from where the reader is, and shows them on the bar."""
        self._reader, self._size, self._bar = reader, size, bar
        self.count = 0

    def __next__(self) -> Entry:
        if self.count == self._size:
            raise StopIteration
        entry = next(self._reader)
        self.count += 1
        self._bar.update(1)
        return entry

    def is_last(self) -> bool:
        """Tells, once all are taken, whether the shard has no more."""
        return self._reader.is_exhausted()


def make_parts(
    share: ShardParts,
    size: int,
    find: Callable[[int], dict[str, Any] | None],
    make: Callable[[int, PartEntries], dict[str, Any]],
    bar: ProgressBar,
) -> Iterator[dict[str, Any]]:
    """Yields the manifests of one process's parts of a shard, and makes those that are missing.

    Args:
        share: the parts.
        size: entries a part.
        find: number of a part -> its manifest with "entries" and "is_last"; None where it is
            missing.
        make: makes a part of its number and its entries; returns the manifest.
        bar: over the entries.
    """
    reader: ShardReader | None = None
    for part in itertools.count():
        is_own = part % share.step == share.first
        manifest = find(part)
        if is_own and manifest is not None:
            bar.update(manifest["entries"])
        elif is_own:
            reader = reader or ShardReader(share.shard)
            if not reader.seek(part * size) and part:
                return  # another process has the last part, and has not finished it yet
            manifest = make(part, PartEntries(reader, size, bar))
        if is_own and manifest is not None:
            yield manifest
        if manifest is not None and manifest["is_last"]:
            return
