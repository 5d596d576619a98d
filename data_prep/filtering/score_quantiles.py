"""Quantiles of the scores of any number of pairs, exact, in bounded memory.

Float32 numbers are ordered like the integers of 32 bits that `_rank_bits` makes of them. A first
pass counts the upper half of these integers, and a second one the lower half of those among which a
quantile lies.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.filtering import decisions

_HALF = 2**16


def score_quantiles(paths: Sequence[str], name: str, shares: Sequence[float]) -> list[float] | None:
    """The least scores that are as high as a share of all.

    Args:
        paths: files of decisions.
        name: of the score.
        shares: in [0, 1].

    Returns:
        For each share the value as of `numpy.quantile` with method "inverted_cdf", of the pairs
        that have the score; None where none has.
    """
    upper = np.zeros(_HALF, np.int64)
    for ranks in _read_ranks(paths, name):
        upper += np.bincount(ranks >> 16, minlength=_HALF)
    ends = np.cumsum(upper)
    if not ends[-1]:
        return None
    numbers = [max(1, math.ceil(share * int(ends[-1]))) for share in shares]
    bins = np.searchsorted(ends, numbers)
    lower = {int(found): np.zeros(_HALF, np.int64) for found in bins}
    for ranks in _read_ranks(paths, name):
        for found, counts in lower.items():
            counts += np.bincount(ranks[ranks >> 16 == found] & (_HALF - 1), minlength=_HALF)
    values = []
    for number, found in zip(numbers, bins.tolist(), strict=True):
        before = int(ends[found]) - int(upper[found])
        low = int(np.searchsorted(np.cumsum(lower[found]), number - before))
        values.append(_value_of(found << 16 | low))
    return values


def _read_ranks(paths: Sequence[str], name: str) -> Iterator[np.ndarray]:
    for path in paths:
        for rows in decisions.read_decisions(path, [name]):
            values = rows[name].drop_null().to_numpy()
            yield _rank_bits(values[~np.isnan(values)])


def _rank_bits(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.int64)
    return np.where(bits >> 31, 0xFFFFFFFF - bits, bits + 0x80000000)


def _value_of(rank: int) -> float:
    bits = rank - 0x80000000 if rank >= 0x80000000 else 0xFFFFFFFF - rank
    return float(np.array(bits, np.uint32).view(np.float32))
