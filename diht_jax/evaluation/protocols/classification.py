"""Zero-shot classification with class names and prompt templates.

The protocol is CLIP's and DiHT's (arXiv 2301.02280, section "Evaluation", and the official
inference code): every class name is put into every template; the text embeddings are normalised,
averaged over the templates and normalised again; the class with the largest cosine similarity to
the image wins.

A source may have several test splits (`metadata["splits"]`, as UCF-101's three): each is measured
on its own images, and the metrics are the means over the splits.

Ours, ties: among classes with equal similarity the first in the list wins, whichever is right. (Two
of CLIP's ImageNet names occur twice; the official arg-max does the same.)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import (
    Batching,
    EmbeddingModel,
    EncodedImages,
    encode_images,
    encode_text_batches,
)
from diht_jax.evaluation.prompts import check_templates, fill_template
from diht_jax.evaluation.protocols.base import (
    CLASS_NAMES,
    LABEL,
    TEMPLATES,
    Measured,
    Metric,
    Option,
    Protocol,
    Task,
    parse_text,
)
from diht_jax.evaluation.protocols.class_metrics import (
    Groups,
    describe_groups,
    f1_macro,
    metrics_of_groups,
    metrics_of_ranks,
    metrics_of_splits,
    rank_labels,
    read_group,
)
from diht_jax.evaluation.protocols.class_names import (
    Classes,
    derive_classes,
    name_index,
    raw_label,
    resolve_label,
)
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

ALL_CLASSES, WITH_IMAGES = "all", "with_images"
TIES = "among equally similar classes the first in the list wins"

# A confusion matrix of more classes is left out of the results: they should stay readable.
_MOST_CONFUSION_CLASSES = 50


@dataclasses.dataclass(frozen=True)
class ClassificationResult:
    """Result of `classify`; n images, C classes.

    Attributes:
        encoded: the images.
        classes: names and labels.
        templates: the ones used.
        classifier: float32 [C, d].
        predictions: int32 [n], the first class.
        ranks: int32 [n], the rank of the right class, 0 when it is the first.
        members: number of a test split -> bool [n], its images; empty where there are none.
        groups: of the images; None where they are not asked for.
        with_f1: whether the macro F1 is one of the metrics.
    """

    encoded: EncodedImages
    classes: Classes
    templates: tuple[str, ...]
    classifier: np.ndarray
    predictions: np.ndarray
    ranks: np.ndarray
    members: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)
    groups: Groups | None = None
    with_f1: bool = False

    def per_class(self) -> list[dict[str, str | int | float | None]]:
        """Name, number of images and accuracy of every class; None for one without images."""
        hits = np.bincount(self.classes.labels, self.ranks == 0, len(self.classes.names))
        totals = np.bincount(self.classes.labels, minlength=len(self.classes.names))
        return [
            {"class": name, "images": int(total), "accuracy": hit / total if total else None}
            for name, total, hit in zip(self.classes.names, totals, hits.tolist(), strict=True)
        ]

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """See `classification_metrics`; and those of the groups, and the macro F1."""
        return self.resampled_metrics(np.ones(len(self.ranks), np.int64))

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """Metrics if image i had been there `counts[i]` times; int [n]."""
        labels, number = self.classes.labels, len(self.classes.names)
        metrics = metrics_of_splits(self.ranks, labels, number, self.members.values(), counts)
        if self.groups is not None:
            metrics |= metrics_of_groups(self.ranks, self.groups, number, counts)
        if self.with_f1:
            metrics["f1_macro"] = f1_macro(self.predictions, labels, counts)
        return metrics

    def confusion(self) -> np.ndarray:
        """Images of the class of the row that were taken for that of the column: int [C, C]."""
        counts = np.zeros((len(self.classes.names),) * 2, np.int64)
        np.add.at(counts, (self.classes.labels, self.predictions), 1)
        return counts


def classify(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    class_names: Sequence[str] | None,
    templates: Sequence[str],
    *,
    label_field: str | None = None,
    candidates: str = ALL_CLASSES,
    group: str | None = None,
    with_f1: bool = False,
    batching: Batching | None = None,
) -> ClassificationResult:
    """Embeds all images of `pairs`, and measures how well their classes are found.

    Args:
        model: see `EmbeddingModel`.
        pairs: consumed once; labels as `class_names.raw_label` reads them.
        class_names: one per label; None derives them from the data (`derive_classes`).
        templates: each with one "{}".
        label_field: metadata field of the label, where it is not "label".
        candidates: "all" classes compete, or those "with_images" alone, as in ImageNet-R, whose
            labels are 200 of ImageNet's 1,000.
        group: of the images, as `class_metrics.read_group` takes it; adds the worst group.
        with_f1: adds the macro F1.
        batching: the defaults where None.

    Raises:
        ValueError: a bad template, a label that cannot be resolved, no usable pair.
    """
    templates = check_templates(templates)
    names = None if class_names is None else tuple(class_names)
    index = None if names is None else name_index(names)

    def describe(pair: Pair) -> tuple[Any, tuple[int, ...], int | str]:
        raw = raw_label(pair, label_field)
        label = raw if names is None else resolve_label(raw, names, index)
        own_group = "" if group is None else read_group(pair, group)
        return label, tuple(pair.metadata.get("splits", ())), own_group

    encoded = encode_images(model, pairs, describe, batching)
    labels, splits, groups = zip(*encoded.notes, strict=True)
    if names is None:
        classes = derive_classes(labels, templates)
    else:
        classes = Classes(names, np.array(labels, np.int32), "names given")
        if candidates == WITH_IMAGES:
            present, found = np.unique(classes.labels, return_inverse=True)
            chosen = tuple(names[label] for label in present)
            classes = Classes(chosen, found.astype(np.int32), "names given, of classes with images")
    classifier = zero_shot_classifier(model.encode_text, classes.names, templates, batching)
    predictions, ranks = rank_labels(encoded.image_emb, classes.labels, classifier)
    return ClassificationResult(
        encoded=encoded,
        classes=classes,
        templates=templates,
        classifier=classifier,
        predictions=predictions,
        ranks=ranks,
        members={
            split: np.array([split in own for own in splits])
            for split in sorted(set(itertools.chain(*splits)))
        },
        groups=None if group is None else Groups.of(groups),
        with_f1=with_f1,
    )


def zero_shot_classifier(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str],
    templates: Sequence[str],
    batching: Batching | None = None,
) -> np.ndarray:
    """One embedding per class: the normalised mean of the normalised embeddings of its prompts.

    Args:
        encode_text: list of str -> float [b, d], normalised or not; called with a batch of texts
            each time.
        class_names: C names.
        templates: T templates, each with one "{}".
        batching: the defaults where None.

    Returns:
        float32 [C, d], L2-normalised. The mean is taken in float64.
    """
    templates = check_templates(templates)
    if not len(class_names):
        raise ValueError("class_names: expected at least one class name, got none")
    prompts = [fill_template(template, name) for name in class_names for template in templates]
    batches = encode_text_batches(encode_text, prompts, batching)
    sums, start = 0.0, 0
    for text_emb in batches:
        if not start:
            sums = np.zeros((len(class_names), text_emb.shape[-1]), np.float64)
        class_of_prompt = np.arange(start, start + len(text_emb)) // len(templates)
        np.add.at(sums, class_of_prompt, _normalize(text_emb.astype(np.float64)))
        start += len(text_emb)
    return _normalize(sums / len(templates)).astype(np.float32)


def classification_metrics(
    image_emb: np.ndarray, labels: np.ndarray, classifier: np.ndarray
) -> dict[str, float]:
    """Accuracy of the nearest class.

    Args:
        image_emb: float [n, d], L2-normalised.
        labels: int [n], rows of `classifier`.
        classifier: float [C, d], L2-normalised.

    Returns:
        Fractions: `top1`; `top5`, when there are more than 5 classes; `mean_per_class`, the mean
        of the accuracies of the classes that have images.

    Raises:
        ValueError: shapes or labels that do not fit, embeddings not finite.
    """
    labels = np.asarray(labels)
    _, ranks = rank_labels(image_emb, labels, classifier)
    return metrics_of_ranks(ranks, labels, len(classifier), np.ones(len(labels), np.int64))


def _normalize(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _run(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], batching: Batching
) -> Measured:
    result = classify(
        model,
        entries,
        task.class_names,
        task.templates,
        label_field=task.label_field,
        candidates=task.options.get("candidates", ALL_CLASSES),
        group=task.options.get("group"),
        with_f1="f1" in task.options,
        batching=batching,
    )
    names, per_class = result.classes.names, result.per_class()
    details: dict[str, Any] = {"per_class": per_class}
    if len(names) <= _MOST_CONFUSION_CLASSES:
        details["confusion"] = result.confusion().tolist()
    protocol = {
        "class_names_from": result.classes.origin,
        "label_field": task.label_field or "label",
        "templates": list(result.templates),
        "text_embedding": "normalised, averaged over the templates, normalised",
        "ties": TIES,
    }
    if result.members:
        protocol["mean_over_splits"] = list(result.members)
    if result.groups is not None:
        protocol["group"] = task.options["group"]
        details["per_group"] = describe_groups(result.ranks, result.groups)
    return Measured(
        encoded=result.encoded,
        num_items=len(result.ranks),
        measure=result.resampled_metrics,
        protocol=protocol,
        counts={
            "images": len(result.predictions),
            **{f"images_of_split_{split}": int(x.sum()) for split, x in result.members.items()},
            "classes": len(names),
            "classes_without_images": sum(not entry["images"] for entry in per_class),
            "texts": len(names) * len(result.templates),
        },
        details=details,
        result=result,
    )


def _parse_candidates(value: Any) -> str:
    if value not in (ALL_CLASSES, WITH_IMAGES):
        raise ValueError(f"candidates={value}: expected {ALL_CLASSES} or {WITH_IMAGES}")
    return value


def _parse_f1(value: Any) -> str:
    if value != "macro":
        raise ValueError(f"f1={value}: expected macro, the mean over the classes with images")
    return value


def _parse_group(value: Any) -> str:
    is_position = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return str(value) if is_position else parse_text(value)


PROTOCOL = Protocol(
    run=_run,
    metrics={
        "top1": Metric("share", "top-1"),
        "top5": Metric("share", "top-5"),
        "mean_per_class": Metric("share", "mean per class"),
        "worst_group": Metric("share", "top-1 of the worst group"),
        "worst_group_top5": Metric("share", "top-5 of the worst group"),
        "f1_macro": Metric("share", "macro F1"),
    },
    options={
        "class_names": CLASS_NAMES,
        "templates": TEMPLATES,
        "label": LABEL,
        "candidates": Option(_parse_candidates),
        "group": Option(_parse_group),
        "f1": Option(_parse_f1),
    },
)
