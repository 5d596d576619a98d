"""The order of examples: which record stands at a position of the run.

A position counts examples from the start of the run, over all hosts and epochs. The record there is
a function of (seed, position) alone. There are two orders: a permutation of all records, and one
that reads whole blocks of consecutive records, so that a request to a bucket brings hundreds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import grain.experimental
import ml_collections
import numpy as np

from diht_jax.input.block_order import BlockOrder
from diht_jax.storage.stores import is_remote

# Of `config.data.order`, beside "auto".
ORDERS = ("global", "blocks")
# Permuted by grain as 32-bit numbers: of more records, some would come twice and others never.
MAX_GLOBAL_RECORDS = 2**32 - 1


def resolve_order(order: str, train: str | Sequence[str] | None, name: str = "data.order") -> str:
    """The order that a config asks for.

    Args:
        order: one of `ORDERS`, or "auto": blocks where any of the data lies in an object store.
        train: paths of the data, or URLs.
        name: of the key, for the message.

    Raises:
        ValueError: another value.
    """
    if order not in (*ORDERS, "auto"):
        raise ValueError(f"config.{name}='{order}': expected 'auto', 'global' or 'blocks'")
    if order != "auto":
        return order
    paths = [train] if isinstance(train, str | os.PathLike) else train or ()
    return "blocks" if any(is_remote(os.fspath(path)) for path in paths) else "global"


def make_order(
    records: Any, order: str, data: ml_collections.ConfigDict, seed: int, process_count: int = 1
) -> GlobalOrder | BlockOrder:
    """The order of a source of records.

    Args:
        records: with a length, and with `block_starts` for blocks.
        order: of `ORDERS`, or "auto".
        data: the section `config.data`.
        seed: of the permutations.
        process_count: how many hosts read it together.

    Raises:
        ValueError: numbers in `data` that do not fit each other or the hosts.
    """
    if resolve_order(order, getattr(records, "paths", None)) == "global":
        return GlobalOrder(len(records), seed)
    return BlockOrder(
        records.block_starts(data.block_records),
        seed,
        num_streams=count_streams(data, process_count),
        window_blocks=data.window_blocks,
    )


def count_streams(data: ml_collections.ConfigDict, process_count: int = 1) -> int:
    """Streams of the order in blocks: `data.num_streams`, but no more than a batch has rows.

    Raises:
        ValueError: they do not divide the batch, or the hosts do not divide them.
    """
    streams = min(data.num_streams, data.batch_size)
    if data.batch_size % streams:
        fitting = next(n for n in range(streams, 0, -1) if data.batch_size % n == 0)
        raise ValueError(
            f"config.data.num_streams={data.num_streams} does not divide "
            f"config.data.batch_size={data.batch_size}; the next smaller number that does is "
            f"{fitting}"
        )
    if streams % process_count:
        raise ValueError(
            f"config.data.num_streams={data.num_streams} is no multiple of the {process_count} "
            "processes, each of which reads streams of its own; choose a multiple that divides "
            f"config.data.batch_size={data.batch_size}"
        )
    return streams


def derived_seed(seed: int, depth: int) -> int:
    """The seed of a transform that comes `depth` transforms after `.seed(seed)` in grain's graph.

    `MapDataset.source(...).seed(seed).shuffle().repeat().random_map(...)` was the whole input once;
    its runs go on with the same order and the same crops.
    """
    return int(np.random.SeedSequence([seed, depth]).generate_state(1, np.uint32)[0])


class GlobalOrder:
    """Every epoch is a permutation of all records, drawn anew, as grain's `shuffle` does it."""

    def __init__(self, num_records: int, seed: int):
        """Draws nothing yet.

        Args:
            num_records: of the source, n.
            seed: of the permutations.

        Raises:
            ValueError: more records than grain can permute.
        """
        if num_records > MAX_GLOBAL_RECORDS:
            raise ValueError(
                f"config.data.order='global' permutes at most {MAX_GLOBAL_RECORDS} records, and "
                f"there are {num_records}: some would come twice an epoch and others never; set "
                "config.data.order='blocks'"
            )
        self._num_records = num_records
        self._seed = derived_seed(seed, depth=1)

    def __getitem__(self, position: int) -> int:
        """The number of the record, in [0, n), at a position from 0."""
        epoch, number = divmod(position, self._num_records)
        return grain.experimental.index_shuffle(
            number,
            max_index=self._num_records - 1,
            seed=(self._seed + epoch) % 2**32,
            rounds=4,
        )

    def describe(self, batch_size: int) -> str:
        """What is mixed, for the log."""
        return f"every epoch is a permutation of all {self._num_records:,} records"

    def same_block_rows(self, batch_size: int, block_records: int) -> float:
        """How many other rows of a batch come from the block of a row, on average.

        Args:
            batch_size: N, within an epoch.
            block_records: K, of consecutive records that count as one block.

        Returns:
            (N - 1) (K - 1) / (n - 1).
        """
        return (batch_size - 1) * (block_records - 1) / max(1, self._num_records - 1)
