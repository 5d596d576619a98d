"""Zero-shot tasks measured by the ranking of scores: multi-label and binary classification.

The average precision of a class uses all points (like scikit-learn's `average_precision_score`).
With `interpolation=11` it is that of PASCAL VOC 2007: the mean, over the recalls 0, 0.1, ... 1, of
the best precision at this recall or a higher one. Choices of this implementation: the mean is over
classes that have an image, and images with equal scores enter together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from diht_jax.evaluation.embedding.encoding import EncodedImages, Encoder, UnusablePair
from diht_jax.evaluation.protocols.base import (
    Measured,
    Metric,
    Protocol,
    Task,
    check_has_class_names,
    choice,
    parse_templates,
    parse_text,
    read_class_names,
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
    """The items of one class, sorted by descending score.

    Resampling changes how often an item counts but not the order. A ranking is therefore sorted
    once, and each resample takes two sums over it. Items with equal scores enter together; a step
    is a distinct score of a positive.
    """

    items: np.ndarray  # int32, items up to the last positive and its ties
    is_positive: np.ndarray  # bool, one per item
    ends: np.ndarray  # int [steps], index of the last item that enters with each step

    def average_precision(self, counts: np.ndarray, points: str = "all") -> float:
        """Computes the average precision, by "all" points or VOC's "11"; NaN without positives.

        Args:
            counts: int [n], weight of each item.
            points: "all" or "11".
        """
        weights = counts[self.items]
        found = np.cumsum(weights * self.is_positive)[self.ends]
        if not found.any():
            return float("nan")
        # Before the first item that counts there is neither a precision nor a step.
        precision = found / np.maximum(np.cumsum(weights)[self.ends], 1)
        if points == "all":
            return float((np.diff(found, prepend=0) * precision).sum() / found[-1])
        # Recall in tenths as integers: 3 of 10 positives are a recall of 0.3.
        reached = _RECALL_POINTS * found >= np.arange(_RECALL_POINTS + 1)[:, None] * found[-1]
        return float(np.where(reached, precision, 0).max(axis=1).mean())


def run(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and scores every class; resampled items are the images.

    A binary task reads its label like a classification. Otherwise `metadata["labels"]` (or the
    task's field) lists numbers or names of classes. An image without that list is skipped as
    "no_label". One with an empty list is a negative for every class, except for those in
    `metadata["ignored_labels"]` or, if present, those not in `metadata["counted_labels"]`.
    `Measured.result` has scores, float32 [n, C], and targets, bool [n, C].

    Raises:
        ValueError: a label that cannot be resolved, only positives or negatives, no usable pair.
    """
    binary, names = task.kind == "binary", task.names
    if binary and len(names) != 2:
        raise ValueError(
            f"yes and no need two class names, the second for label 1; got {len(names)}"
        )
    index, field = name_index(names), task.label or ("label" if binary else "labels")

    def resolve(pair: Pair, field: str) -> list[int]:
        return resolve_labels(pair, field, names, index)

    def describe(pair: Pair) -> tuple[list[int], list[int], list[int] | None]:
        if binary:
            return [resolve_label(raw_label(pair, task.label), names, index)], [], None
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
    """Returns the result for scores, targets and ignored entries, [n, C]; C is 1 if binary."""
    protocol = {
        "label_field": task.label or ("label" if task.kind == "binary" else "labels"),
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
            # A class without images has no precision.
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
    """Computes the share of correctly ordered (positive, negative) pairs; ties count half.

    NaN unless both kinds occur. `weights` is how often each item counts.
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
    """Sorts the items of a class by score; ignored items are left out."""
    order = np.argsort(-scores, kind="stable").astype(np.int32)
    if ignored is not None:
        order = order[~ignored[order]]
    is_positive = targets[order]
    group_ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    ends = np.unique(group_ends[np.searchsorted(group_ends, np.flatnonzero(is_positive))])
    stop = ends[-1] + 1 if len(ends) else 0
    return Ranking(order[:stop], is_positive[:stop], ends)


_OPTIONS = {"class_names": read_class_names, "templates": parse_templates, "label": parse_text}
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
