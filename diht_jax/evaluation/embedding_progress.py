"""The bar that `embedding_files` shows: over the entries of all shards, of known length or not."""

from __future__ import annotations

import os
from typing import Any

from tqdm import tqdm

from diht_jax.data.source import IMAGE_EXTENSIONS, SourceShard, image_files
from diht_jax.data.tar_files import read_members
from diht_jax.data.tfrecord import TFRecordSource


class EmbeddingProgress:
    """A bar over entries; lengths that shards do not tell are estimated from those that are known,
    by bytes."""

    def __init__(self, shards: list[SourceShard]):
        self._lengths = [_length(shard) for shard in shards]
        if shards and not any(self._lengths) and shards[0].path.endswith(".tar"):
            self._lengths[0] = _count_pictures(shards[0].path)
        self._sizes = [shard.identity()["size_bytes"] for shard in shards]
        self._place = 0
        self._entries = 0
        self._bar = tqdm(unit="pair", dynamic_ncols=True, total=self._total())

    def __enter__(self) -> EmbeddingProgress:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def update(self, num_entries: int) -> None:
        self._entries += num_entries
        self._bar.update(num_entries)

    def finish_shard(self) -> None:
        self._lengths[self._place] = self._entries
        self._place, self._entries = self._place + 1, 0
        self._bar.total = self._total()
        self._bar.refresh()

    def _total(self) -> int | None:
        known = [(n, b) for n, b in zip(self._lengths, self._sizes, strict=True) if n is not None]
        if not known:
            return None
        per_byte = sum(n for n, _ in known) / max(1, sum(b for _, b in known))
        pairs = zip(self._lengths, self._sizes, strict=True)
        return round(sum(size * per_byte if n is None else n for n, size in pairs))


def _length(shard: SourceShard) -> int | None:
    """Entries of a shard, where they can be told without reading it."""
    if shard.kind == "tfds":
        return shard.stop - shard.start
    if shard.kind == "tfrecord":
        return len(TFRecordSource([shard.path]))
    if os.path.isdir(shard.path):
        return len(image_files(shard.path))
    return None


def _count_pictures(path: str) -> int | None:
    """Image members of a plain tar, by their headers; None where these cannot be read."""
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    try:
        # No contents are wanted, of whatever size.
        members = read_members(path, lambda name: -1 if name.lower().endswith(suffixes) else None)
        return sum(1 for _ in members)
    except (ValueError, OSError):
        return None
