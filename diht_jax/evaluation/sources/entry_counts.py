"""Progress bars over the entries of a source, whose number is counted, estimated, or unknown.

No image is read, and nothing that is evaluated may depend on these numbers: they give a bar its end
and its ETA. How the entries of one shard are counted, each format states in `readers.registry`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from diht_jax.progress import ProgressBar
from diht_jax.readers.base import SourceShard
from diht_jax.readers.registry import FORMATS
from diht_jax.readers.webdataset import count_images
from diht_jax.storage.stores import is_remote


def count_entries(shards: Sequence[SourceShard]) -> int | None:
    """Entries of all shards; None where none has a known length."""
    sizes = [shard.identity()["size_bytes"] for shard in shards]
    return estimate_total(shard_lengths(shards), sizes)


def count_tars(paths: Sequence[str]) -> int | None:
    """Pictures in some tars, by the headers of the first one and the sizes of the others.

    None for those in a store, which would be fetched for it.
    """
    if not paths or is_remote(paths[0]):
        return None
    lengths = [count_images(paths[0]), *[None] * (len(paths) - 1)]
    return estimate_total(lengths, [os.path.getsize(path) for path in paths])


def shard_lengths(shards: Sequence[SourceShard]) -> list[int | None]:
    """Entries of each shard, None where unknown; of files that must be read, the first is."""
    formats = [FORMATS[shard.kind] for shard in shards]
    lengths = [
        None if form.count_reads_file else form.count(shard)
        for form, shard in zip(formats, shards, strict=True)
    ]
    if shards and not any(lengths):
        lengths[0] = formats[0].count(shards[0])
    return lengths


def estimate_total(lengths: Sequence[int | None], sizes: Sequence[int]) -> int | None:
    """The sum of the lengths; those that are None are estimated from the others, by bytes."""
    known = [(n, b) for n, b in zip(lengths, sizes, strict=True) if n is not None]
    if not known:
        return None
    per_byte = sum(n for n, _ in known) / max(1, sum(b for _, b in known))
    pairs = zip(lengths, sizes, strict=True)
    return round(sum(size * per_byte if n is None else n for n, size in pairs))


class EntryProgress:
    """A bar over the entries of all shards; unknown lengths are estimated from the known ones."""

    def __init__(self, shards: list[SourceShard]):
        self._lengths = shard_lengths(shards)
        self._sizes = [shard.identity()["size_bytes"] for shard in shards]
        self._position = 0
        self._entries = 0
        self._bar = ProgressBar(unit="pair", dynamic_ncols=True, total=self._total())

    def __enter__(self) -> EntryProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def update(self, num_entries: int) -> None:
        """Counts entries of the current shard."""
        self._entries += num_entries
        self._bar.update(num_entries)

    def finish_shard(self) -> None:
        """Goes on to the next shard; the length of this one is known now."""
        self._lengths[self._position] = self._entries
        self._position, self._entries = self._position + 1, 0
        self._bar.total = self._total()
        self._bar.refresh()

    def _total(self) -> int | None:
        return estimate_total(self._lengths, self._sizes)
