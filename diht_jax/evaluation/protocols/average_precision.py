"""Average precision of a ranking whose items may count several times.

Called by `label_scores`. Resampling changes how often an item counts and never the order, so a
ranking is sorted once and every resample is two sums over it.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ranking:
    """One class, the items with the highest score first; only what a recall step needs is kept.

    A step is a score that a positive has. Items of equal score enter together.

    Attributes:
        items: int32, items down to the last positive and those with its score.
        item_starts: int [steps], where in `items` those begin that enter with each step.
        positives: int32, the positives in that order.
        positive_starts: int [steps], where in `positives` those of each step begin.
    """

    items: np.ndarray
    item_starts: np.ndarray
    positives: np.ndarray
    positive_starts: np.ndarray

    def average_precision(self, counts: np.ndarray) -> float:
        """The sum over the steps of precision times the step in recall.

        Args:
            counts: int [n], how often each item counts.

        Returns:
            A fraction, or NaN where no positive counts.
        """
        if not len(self.positives) or not counts[self.positives].any():
            return float("nan")
        gained = np.add.reduceat(counts[self.positives], self.positive_starts)
        found = np.cumsum(gained)
        retrieved = np.cumsum(np.add.reduceat(counts[self.items], self.item_starts))
        # Before the first item that counts there is no precision yet, and no step either.
        precision = found / np.maximum(retrieved, 1)
        return float((gained * precision).sum() / found[-1])


def rank_items(scores: np.ndarray, targets: np.ndarray) -> Ranking:
    """Sorts the items of a class.

    Args:
        scores: float [n], finite.
        targets: bool [n].
    """
    order = np.argsort(-scores, kind="stable").astype(np.int32)
    places = np.flatnonzero(targets[order])
    if not len(places):
        none = np.zeros(0, np.int32)
        return Ranking(none, none, none, none)
    group_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)) + 1
    groups, positive_starts = np.unique(
        np.searchsorted(group_ends, places, side="right"), return_index=True
    )
    ends = group_ends[groups]
    return Ranking(
        items=order[: ends[-1]],
        item_starts=np.append(0, ends[:-1]),
        positives=order[places],
        positive_starts=positive_starts,
    )
