"""Zero-shot tasks that are measured by the order of scores: several labels an image, or yes and no.

The average precision of a class is over all points (as scikit-learn's `average_precision_score`),
or with `interpolation=11` that of PASCAL VOC 2007: the mean, over the recalls 0, 0.1, ... 1, of the
best precision at such a recall or a higher one. Ours: the mean is over the classes that have an
image, and images of equal score enter together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diht_jax.evaluation.embedding.encoding import EncodedImages, Encoder, UnusablePair
from diht_jax.evaluation.protocols.base import (
    CLASS_NAMES,
    LABEL,
    TEMPLATES,
    Measured,
    Metric,
    Protocol,
    Task,
    check_has_class_names,
    choice,
)
from diht_jax.evaluation.protocols.class_names import (
    name_index,
    raw_label,
    resolve_label,
    resolve_labels,
)
from diht_jax.evaluation.protocols.classification import zero_shot_classifier
from diht_jax.records.schema import Pair

_RECALL_POINTS = 10  # and recall 0


class Ranking(NamedTuple):
    """One class, the items with the highest score first.

    Resampling changes how often an item counts and never the order, so a ranking is sorted once
    and every resample is two sums over it. Items of equal score enter together; a step is a score
    that a positive has.
    """

    items: np.ndarray  # int32, items down to the last positive and those with its score
    is_positive: np.ndarray  # bool, of each of them
    ends: np.ndarray  # int [steps], the last of the items that enter with each step

    def average_precision(self, counts: np.ndarray, points: str = "all") -> float:
        """The average precision, by "all" points or VOC's "11"; NaN where no positive counts.

        Args:
            counts: int [n], how often each item counts.
            points: see above.
        """
        weights = counts[self.items]
        found = np.cumsum(weights * self.is_positive)[self.ends]
        if not found.any():
            return float("nan")
        # Before the first item that counts there is no precision yet, and no step either.
        precision = found / np.maximum(np.cumsum(weights)[self.ends], 1)
        if points == "all":
            return float((np.diff(found, prepend=0) * precision).sum() / found[-1])
        # Recall in tenths as whole numbers: 3 of 10 positives are a recall of 0.3.
        reached = _RECALL_POINTS * found >= np.arange(_RECALL_POINTS + 1)[:, None] * found[-1]
        return float(np.where(reached, precision, 0).max(axis=1).mean())


def run(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and scores every class; items are the images.

    For yes and no the label is read as in a classification; else `metadata["labels"]` (or the
    task's field) lists numbers or names of classes. An image without that list is left out as
    "no_label"; one with an empty list is a negative for all classes but those in
    `metadata["ignored_labels"]`, or, if there is one, outside of `metadata["counted_labels"]`.
    `Measured.result` has the scores, float32 [n, C], and the targets, bool [n, C].

    Raises:
        ValueError: a label that cannot be resolved, targets of one kind only, no usable pair.
    """
    binary, names = task.kind == "binary", task.names
    if binary and len(names) != 2:
        raise ValueError(
            f"yes and no need two class names, the second for label 1; got {len(names)}"
        )
    index, field = name_index(names), task.label_field or ("label" if binary else "labels")

    def resolve(pair: Pair, field: str) -> list[int]:
        return resolve_labels(pair, field, names, index)

    def describe(pair: Pair) -> tuple[list[int], list[int], list[int] | None]:
        if binary:
            return [resolve_label(raw_label(pair, task.label_field), names, index)], [], None
        if pair.metadata.get(field) is None:
            raise UnusablePair("no_label")
        counted = resolve(pair, "counted_labels") if "counted_labels" in pair.metadata else None
        return resolve(pair, field), resolve(pair, "ignored_labels"), counted

    encoded = encoder.images(describe)
    classifier = zero_shot_classifier(
        encoder.model.encode_text, names, task.templates, encoder.batching
    )
    scores = encoded.image_emb @ classifier.T
    targets, ignored = np.zeros(scores.shape, bool), np.zeros(scores.shape, bool)
    for row, (labels, ignored_labels, counted) in enumerate(encoded.notes):
        if counted is not None:
            ignored[row], ignored[row, counted] = True, False
        ignored[row, ignored_labels] = True
        targets[row, labels], ignored[row, labels] = True, False
    if binary:
        scores, targets, ignored = scores[:, 1:] - scores[:, :1], targets[:, 1:], ignored[:, 1:]
    if not targets.any() or targets.all():
        raise ValueError(
            "every image has the same label, so there is no order to measure; expected both kinds"
        )
    return _describe(task, encoded, scores, targets, ignored)


def _describe(
    task: Task,
    encoded: EncodedImages,
    scores: np.ndarray,
    targets: np.ndarray,
    ignored: np.ndarray,
) -> Measured:
    """The result of scores, targets and what is ignored, [n, C]; C is 1 for yes and no."""
    protocol = {
        "label_field": task.label_field or ("label" if task.kind == "binary" else "labels"),
        "templates": list(task.templates),
        "text_embedding": "normalised, averaged over the templates, normalised",
    }
    counts = {
        "images": len(scores),
        "classes": len(task.names),
        "positives": int(targets.sum()),
        "classes_without_images": int((~targets.any(axis=0)).sum()),
    }
    if task.kind == "binary":
        protocol["class_names"] = list(task.names)
        protocol["score"] = "cosine to the second class minus cosine to the first"

        def measure(weights: np.ndarray) -> dict[str, float]:
            return {"auroc": area_under_roc(scores[:, 0], targets[:, 0], weights)}

    else:
        points = task.options.get("interpolation", "all")
        protocol |= {"class_names": "names given", "score": "cosine to the class"}
        protocol["average_precision"] = f"{points} points"
        counts["ignored"] = int(ignored.sum())
        columns = zip(scores.T, targets.T, ignored.T, strict=True)
        rankings = [rank_items(*column) for column in columns]

        def measure(weights: np.ndarray) -> dict[str, float]:
            values = [ranking.average_precision(weights, points) for ranking in rankings]
            # A class without an image has no precision.
            return {"mean_average_precision": float(np.nanmean(values))}

    return Measured(
        encoded=encoded,
        num_items=len(scores),
        measure=measure,
        protocol=protocol,
        counts=counts,
        result=(scores, targets),
    )


def area_under_roc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> float:
    """The share of (positive, negative) pairs in the right order; equal scores count half.

    NaN without both kinds. The weights say how often each item counts.
    """
    _, group = np.unique(scores, return_inverse=True)
    positives = np.bincount(group, weights * targets)
    negatives = np.bincount(group, weights * ~targets)
    below = np.cumsum(negatives) - negatives
    pairs = positives.sum() * negatives.sum()
    return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else float("nan")


def rank_items(
    scores: np.ndarray, targets: np.ndarray, ignored: np.ndarray | None = None
) -> Ranking:
    """Sorts the items of a class by their scores, without those that are ignored."""
    order = np.argsort(-scores, kind="stable").astype(np.int32)
    if ignored is not None:
        order = order[~ignored[order]]
    is_positive = targets[order]
    group_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    ends = np.unique(group_ends[np.searchsorted(group_ends, np.flatnonzero(is_positive))])
    stop = ends[-1] + 1 if len(ends) else 0
    return Ranking(order[:stop], is_positive[:stop], ends)


_OPTIONS = {"class_names": CLASS_NAMES, "templates": TEMPLATES, "label": LABEL}
MULTILABEL = Protocol(
    run=run,
    metrics={"mean_average_precision": Metric("share", "mean average precision")},
    options={**_OPTIONS, "interpolation": choice("interpolation", "11", "all")},
    check=check_has_class_names,
)
BINARY = Protocol(
    run=run,
    metrics={"auroc": Metric("share", "AUROC")},
    options=_OPTIONS,
    check=check_has_class_names,
)
