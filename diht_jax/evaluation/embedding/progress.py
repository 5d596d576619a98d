"""The bar that `embedding_files` shows: over the entries of all shards, of known length or not."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from diht_jax.data.readers.base import SourceShard
from diht_jax.evaluation.sources.entry_counts import estimate_total, shard_lengths


class EmbeddingProgress:
    """A bar over entries; lengths that shards do not tell are estimated from those that are known,
    by bytes."""

    def __init__(self, shards: list[SourceShard]):
        self._lengths = shard_lengths(shards)
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
        return estimate_total(self._lengths, self._sizes)
