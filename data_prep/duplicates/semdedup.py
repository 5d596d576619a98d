"""Near-duplicates within one cluster, as SemDeDup finds them (arXiv 2303.09540, algorithm 1).

The rows of a cluster come ranked by the rule that says which one stays; a row is dropped when its
cosine with any row of a better rank is at least the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# SemDeDup keeps the row that is farthest from the centroid.
KEEP = ("farthest", "largest", "first")

_BLOCK = 2048  # rows of a product: 16 MB of cosines
_AHEAD = 4  # that cosines of rows of one caption get, so that they are above all others


class Near(NamedTuple):
    """Rows that repeat another one, by their numbers.

    Attributes:
        rows: int64 [m].
        alike: int64 [m], the row of a better rank that each is most alike.
        similarity: float32 [m], of the two.
    """

    rows: np.ndarray
    alike: np.ndarray
    similarity: np.ndarray


NONE = Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))


def find_candidates(
    ranked: np.ndarray, threshold: float, count: int = 1, captions: np.ndarray | None = None
) -> Iterator[Near]:
    """Finds the rows of a better rank that each row of a cluster is most alike.

    Args:
        ranked: float32 [n, d], embeddings of unit length, the row that stays first.
        threshold: least cosine.
        count: of them for each row, at most.
        captions: [n], numbers of the rows' captions: rows of the same one come first.

    Yields:
        `count` times: the best partner of each row that has one, then the second best, and so on.
    """
    best = np.full((len(ranked), count), -np.inf, np.float32)
    partner = np.full((len(ranked), count), -1)
    for start in range(0, len(ranked), _BLOCK):
        later = ranked[start : start + _BLOCK]
        stop = start + len(later)
        for first in range(0, stop, _BLOCK):
            cosines = later @ ranked[first : first + _BLOCK].T
            if first == start:
                cosines[~np.tri(len(later), k=-1, dtype=bool)] = -np.inf  # only rows before a row
            if captions is not None:
                is_same = captions[start:stop, None] == captions[first : first + _BLOCK]
                cosines[is_same & (cosines >= threshold)] += _AHEAD
            numbers = np.broadcast_to(np.arange(first, first + cosines.shape[1]), cosines.shape)
            best[start:stop], partner[start:stop] = _highest(
                np.concatenate([best[start:stop], cosines], axis=1),
                np.concatenate([partner[start:stop], numbers], axis=1),
                count,
            )
    for number in range(count):
        rows = np.flatnonzero(best[:, number] >= threshold)
        cosines = best[rows, number]
        yield Near(
            rows, partner[rows, number], np.where(cosines > _AHEAD / 2, cosines - _AHEAD, cosines)
        )


def _highest(values: np.ndarray, numbers: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The highest values of each row, and their numbers, the highest first."""
    if count == 1:
        chosen = values.argmax(axis=1)[:, None]
    else:
        chosen = np.argpartition(-values, count - 1, axis=1)[:, :count]
        ordered = np.argsort(-np.take_along_axis(values, chosen, axis=1), axis=1, kind="stable")
        chosen = np.take_along_axis(chosen, ordered, axis=1)
    return np.take_along_axis(values, chosen, axis=1), np.take_along_axis(numbers, chosen, axis=1)


def best_partners(parts: Sequence[Near], captions: np.ndarray) -> Near:
    """The best partner of each row of several clusters: of its caption, then the most similar."""
    found = Near(*map(np.concatenate, zip(NONE, *parts, strict=True)))
    is_other = captions[found.rows] != captions[found.alike]
    order = np.lexsort((found.alike, -found.similarity, is_other, found.rows))
    _, first = np.unique(found.rows[order], return_index=True)
    return Near(*(column[order][first] for column in found))
