"""How well predicted concepts agree with the captions: recall of images, recall of concepts.

NumPy only.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from data_prep.labelling.vocabulary import Targets

RANKS = (1, 5, 10)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Ranked concepts of images, and the concepts that their own captions name.

    Attributes:
        ids: int [n, k], best first, each concept at most once in a row.
        targets: of the n images; each has at least one.
    """

    ids: np.ndarray
    targets: Targets

    @functools.cached_property
    def _ranks(self) -> np.ndarray:
        """int [number of targets], rank of each in its image's row, from 0; huge for none."""
        found = self.ids[self.targets.rows()] == self.targets.ids[:, None]
        return np.where(found.any(axis=1), found.argmax(axis=1), np.iinfo(np.int64).max)

    def recall(self, k: int) -> float:
        """Share of an image's own concepts among its first k predictions, mean over images."""
        hits = np.bincount(self.targets.rows()[self._ranks < k], minlength=len(self.targets))
        return float(np.mean(hits / self.targets.lengths))

    def concept_recall(self, k: int, num_concepts: int) -> np.ndarray:
        """Share of a concept's images that have it among their first k predictions.

        Args:
            k: predictions that count.
            num_concepts: v.

        Returns:
            float64 [v]; NaN for a concept that no image has.
        """
        positives = self.targets.counts(num_concepts)
        hits = np.bincount(self.targets.ids[self._ranks < k], minlength=num_concepts)
        return np.where(positives > 0, hits / np.maximum(positives, 1), np.nan)


def frequency_baseline(train: Targets, held_out: Targets, num_concepts: int, k: int) -> Predictions:
    """Predicts the most frequent concepts of the training captions for every image."""
    counts = train.counts(num_concepts)
    most_frequent = np.argsort(-counts, kind="stable")[:k]
    return Predictions(np.tile(most_frequent, (len(held_out), 1)), held_out)


def summarize(predictions: Predictions, num_concepts: int) -> dict[str, Any]:
    """Recall and mean recall per concept, at each of `RANKS`."""
    per_concept = {k: predictions.concept_recall(k, num_concepts) for k in RANKS}
    return {
        **{f"recall_at_{k}": predictions.recall(k) for k in RANKS},
        **{f"concept_recall_at_{k}": float(np.nanmean(per_concept[k])) for k in RANKS},
    }
