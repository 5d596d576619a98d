"""Records that a run does not train on, so that it can be measured on them."""

from __future__ import annotations

import os
from typing import Any

import ml_collections
import numpy as np

NOTHING = np.zeros(0, np.int64)


class Others:
    """The records that are not held out, numbered anew in their order."""

    def __init__(self, held_out: np.ndarray):
        """Takes the numbers of those that are, rising."""
        # How many of the others come before each of them.
        self._before = held_out - np.arange(len(held_out))

    def record(self, number: int) -> int:
        """The number among all records."""
        if not len(self._before):
            return number
        return number + int(np.searchsorted(self._before, number, side="right"))


def held_out_records(records: Any, data: ml_collections.ConfigDict, seed: int) -> np.ndarray:
    """Numbers of the records of a source that `config.data.validation_share` holds out.

    Whether a record is held out is a function of `config.seed`, the name of its shard (without the
    folder) and its place there alone, so that shards may be moved or added.

    Returns:
        int64, rising.

    Raises:
        ValueError: the share is of so few records that it is none of them, or all.
    """
    share = data.get("validation_share")
    if not share:
        return NOTHING
    found, start = [NOTHING], 0
    for path, length in zip(records.paths, map(int, records.shard_lengths), strict=True):
        bits = np.random.PCG64([seed, *os.path.basename(path).encode()]).random_raw(length)
        found.append(start + np.flatnonzero(bits < np.uint64(share * 2**64)))
        start += length
    held_out = np.concatenate(found)
    if not 0 < len(held_out) < start:
        raise ValueError(
            f"config.data.validation_share={share} holds out {len(held_out)} of the {start} "
            "records; expected a share that leaves some of both, or 0"
        )
    return held_out
