"""Near-duplicates within one cluster, as SemDeDup finds them (arXiv 2303.09540, algorithm 1).

The rows of a cluster are ranked by the rule that says which one stays; a row is dropped when its
cosine with any row of a better rank is at least the threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# SemDeDup keeps the row that is farthest from the centroid.
KEEP = ("farthest", "largest", "first")

_BLOCK = 2048  # rows of a product: 16 MB of cosines


class Near(NamedTuple):
    """The dropped rows of a cluster, as positions in what was given.

    Attributes:
        dropped: int64 [m].
        alike: int64 [m], the row of a better rank that each is most alike.
        root: int64 [m], the kept row at the end of the chain that begins there.
        cosine: float32 [m], with `alike`.
    """

    dropped: np.ndarray
    alike: np.ndarray
    root: np.ndarray
    cosine: np.ndarray


def rank_rows(keep: str, cosines: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """The order of the rows, the one that stays first; equal ones in the order of the input.

    Args:
        keep: one of `KEEP`.
        cosines: float [n], with the centroid.
        pixels: int [n], of the pictures.

    Returns:
        int64 [n].
    """
    if keep == "first":
        return np.arange(len(cosines))
    return np.argsort(cosines if keep == "farthest" else -pixels, kind="stable")


def find_near(embeddings: np.ndarray, order: np.ndarray, threshold: float) -> Near:
    """Finds the near-duplicates of a cluster.

    Args:
        embeddings: float32 [n, d], of unit length.
        order: of `rank_rows`.
        threshold: least cosine.
    """
    ranked = embeddings[order]
    count = len(ranked)
    best = np.full(count, -np.inf, np.float32)
    partner = np.full(count, -1)
    for start in range(0, count, _BLOCK):
        later = ranked[start : start + _BLOCK]
        stop = start + len(later)
        for first in range(0, stop, _BLOCK):
            cosines = ranked[first : first + _BLOCK] @ later.T
            if first == start:
                cosines[np.tri(len(later), dtype=bool)] = -np.inf  # only rows before a row
            found = cosines.argmax(axis=0)
            value = cosines[found, np.arange(len(later))]
            is_better = value > best[start:stop]
            best[start:stop] = np.where(is_better, value, best[start:stop])
            partner[start:stop] = np.where(is_better, found + first, partner[start:stop])
    dropped = np.flatnonzero(best >= threshold)
    root = np.arange(count)
    for position in dropped:  # in order, so that the partner's root is known
        root[position] = root[partner[position]]
    return Near(order[dropped], order[partner[dropped]], order[root[dropped]], best[dropped])
