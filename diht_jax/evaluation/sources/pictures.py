"""Pictures of the layouts of benchmarks, local or in a store."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

from diht_jax.evaluation.embedding.entries import Units
from diht_jax.readers.base import Skipped, read_image
from diht_jax.records.schema import Pair
from diht_jax.storage.files import map_many
from diht_jax.storage.stores import is_remote

# File of a picture below some folder, and its pairs, still without the image; or why it has none.
Item = tuple[str, "Sequence[Pair] | Skipped"]

# Small enough that 5,000 pictures are shared by 64 hosts.
_PICTURES_PER_UNIT = 64


def picture_units(root: str, items: Sequence[Item]) -> Units:
    """Divides pictures into units that read them; several at a time from a store.

    Args:
        root: folder of the pictures, or its URL. What leads out of it is refused.
        items: a picture that cannot be read is one `Skipped`, however many pairs it has.
    """
    root = root if is_remote(root) else os.path.realpath(root)

    def read_item(item: Item) -> Sequence[Pair | Skipped]:
        name, pairs = item
        if isinstance(pairs, Skipped):
            return [pairs]
        image = read_image(root, name, name)
        if isinstance(image, Skipped):
            return [image]
        return [dataclasses.replace(pair, image=image) for pair in pairs]

    def read(part: Sequence[Item]) -> Iterator[Pair | Skipped]:
        for entries in map_many(read_item, part, root):
            yield from entries

    starts = range(0, len(items), _PICTURES_PER_UNIT)
    parts = [items[start : start + _PICTURES_PER_UNIT] for start in starts]
    count = sum(1 if isinstance(pairs, Skipped) else len(pairs) for _, pairs in items)
    return Units([functools.partial(read, part) for part in parts], lambda: count)
