"""The sources of pictures that are embedded or searched, and how processes divide them."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from diht_jax.readers import image_folder, registry
from diht_jax.readers.base import Skipped, SourceShard, image_files
from diht_jax.records.schema import Pair

# Kind of a folder that holds pictures and nothing else; without captions, it is no source of pairs
# for any other purpose.
PICTURES = "pictures"
# Of a folder, so that processes can share a small one.
_PICTURES_PER_UNIT = 64


def list_inputs(source: str | Sequence[str], **source_options: Any) -> list[SourceShard]:
    """The shards of a source; a folder of pictures, alone or beside other files, is one."""
    if not isinstance(source, str) or not os.path.isdir(source):
        return registry.list_shards(source, **source_options)
    names = {e.name for e in os.scandir(source) if not e.name.startswith(".") and e.is_file()}
    pictures = {os.path.basename(path) for path in image_files(source)}
    if names and names <= pictures:
        return [SourceShard(PICTURES, source)]
    try:
        return registry.list_shards(source, **source_options)
    except ValueError:
        if names & pictures:
            return [SourceShard(PICTURES, source)]
        raise


@dataclasses.dataclass(frozen=True)
class Share:
    """What one of several processes has of a shard: every `step`-th part from number `first` on.

    Attributes:
        number: of the shard in its source.
        shard: the shard.
        first, step: 0 and 1 are all parts.
    """

    number: int
    shard: SourceShard
    first: int
    step: int


def shares_of(shards: Sequence[SourceShard], index: int, count: int) -> list[Share]:
    """What a process has of a source.

    Every `count`-th shard. A folder of pictures is divided by all; a file where there are fewer
    shards than processes: it has no index in general, so that each of those that divide it reads
    through it, and decodes and embeds its own parts only.

    Args:
        shards: of the source.
        index, count: of this process, and how many there are.
    """
    shares = []
    for number, shard in enumerate(shards):
        sharing = range(number % count, count, len(shards))
        if shard.kind == PICTURES:
            sharing = range(count)
        if index in sharing:
            shares.append(Share(number, shard, sharing.index(index), len(sharing)))
    return shares


def input_units(shards: Sequence[SourceShard]) -> list[Callable[[], Iterator[Pair | Skipped]]]:
    """Parts of a source that can be read on their own; a folder of pictures has several."""
    units: list[Callable[[], Iterator[Pair | Skipped]]] = []
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
