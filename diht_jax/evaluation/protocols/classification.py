"""Zero-shot classification with class names and prompt templates.

The protocol is CLIP's and DiHT's (arXiv 2301.02280, section "Evaluation", and the official
inference code). The accuracy of the worst group and the macro F1 are those of WILDS (arXiv
2012.07421, `wilds.common.metrics` 2.0), which DataComp (arXiv 2304.14108) reports on its sets with
metadata. In ties the first class of the list wins, as in the official arg-max (two of CLIP's
ImageNet names occur twice).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax.evaluation.embedding.encoding import (
    Batching,
    EncodedImages,
    Encoder,
    check_finite,
    encode_text_batches,
)
from diht_jax.evaluation.protocols.base import (
    CLASS_SLOT,
    Measured,
    Metric,
    Protocol,
    Task,
    check_templates,
    choice,
    parse_templates,
    parse_text,
    read_class_names,
)
from diht_jax.evaluation.protocols.class_names import (
    Classes,
    derive_classes,
    name_index,
    raw_label,
    read_group,
    read_splits,
    resolve_label,
)
from diht_jax.records.schema import Pair

TOP_K = 5
# Images compared with all classes at once, in a block of float32 [images, classes].
_IMAGE_BLOCK = 4096
# Larger confusion matrices are left out of the results to keep them readable.
_MOST_CONFUSION_CLASSES = 50


@dataclasses.dataclass(frozen=True)
class ClassificationResult:
    """True and predicted classes of n images; C classes."""

    classes: Classes
    templates: tuple[str, ...]
    classifier: np.ndarray  # float32 [C, d]
    predictions: np.ndarray  # int32 [n], the top class
    ranks: np.ndarray  # int32 [n], the rank of the right class, 0 if it is the top class
    splits: dict[int, np.ndarray]  # test split -> bool [n], its images; may be empty
    groups: dict[int | str, np.ndarray]  # group -> bool [n]; empty unless requested
    with_f1: bool  # whether to compute the macro F1

    def measure(self, counts: np.ndarray) -> dict[str, float]:
        """Computes the metrics with image i counted `counts[i]` times; int [n]."""
        labels, num_classes = self.classes.labels, len(self.classes.names)
        every_split = [
            metrics_of_ranks(self.ranks, labels, num_classes, counts * inside)
            for inside in self.splits.values() or [np.ones(len(labels), np.int64)]
        ]
        metrics = {
            name: float(np.mean([one[name] for one in every_split])) for name in every_split[0]
        }
        if self.groups:
            metrics |= metrics_of_groups(self.ranks, self.groups.values(), num_classes, counts)
        if self.with_f1:
            metrics["f1_macro"] = f1_macro(self.predictions, labels, counts)
        return metrics

    def per_class(self) -> list[dict[str, Any]]:
        """Returns name, number of images and accuracy of every class; None without images."""
        hits = np.bincount(self.classes.labels, self.ranks == 0, len(self.classes.names))
        totals = np.bincount(self.classes.labels, minlength=len(self.classes.names))
        return [
            {"class": name, "images": int(total), "accuracy": hit / total if total else None}
            for name, total, hit in zip(self.classes.names, totals, hits.tolist(), strict=True)
        ]

    def per_group(self) -> list[dict[str, Any]]:
        """Returns name, number of images, and top-1 and top-5 accuracy of every group."""
        rows = []
        for name, inside in self.groups.items():
            ranks = self.ranks[inside]
            shares = {"top1": float(np.mean(ranks == 0)), "top5": float(np.mean(ranks < TOP_K))}
            rows.append({"group": name, "images": len(ranks), **shares})
        return rows

    def confusion(self) -> np.ndarray:
        """Returns the number of images by true class (row) and predicted class (column), [C, C]."""
        counts = np.zeros((len(self.classes.names),) * 2, np.int64)
        np.add.at(counts, (self.classes.labels, self.predictions), 1)
        return counts


def run(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and classifies them; resampled items are the images.

    `class_names.raw_label` reads the labels. Without class names, `derive_classes` infers them from
    the data. `Measured.result` is a `ClassificationResult`.
    """
    names, group = task.class_names, task.options.get("group")
    index = None if names is None else name_index(names)

    def describe(pair: Pair) -> tuple[Any, list[int], list[int | str]]:
        label: Any = raw_label(pair, task.label)
        if names is not None and index is not None:
            label = resolve_label(label, names, index)
        own_group = [] if group is None else [read_group(pair, group)]
        return label, read_splits(pair), own_group

    encoded = encoder.images(describe)
    labels, splits, groups = zip(*encoded.notes, strict=True)
    if names is None:
        classes = derive_classes(labels, task.templates)
    elif task.options.get("candidates") == "with_images":
        present, found = np.unique(labels, return_inverse=True)
        own_names = tuple(names[label] for label in present)
        origin = "names given, of classes with images"
        classes = Classes(own_names, found.astype(np.int32), origin)
    else:
        classes = Classes(names, np.array(labels, np.int32), "names given")
    classifier = zero_shot_classifier(
        encoder.model.encode_text, classes.names, task.templates, encoder.batching
    )
    result = ClassificationResult(
        classes,
        task.templates,
        classifier,
        *rank_labels(encoded.image_emb, classes.labels, classifier),
        splits=_members(splits),
        groups=_members(groups),
        with_f1="f1" in task.options,
    )
    return _describe(task, encoded, result)


def _members(values: Sequence[Sequence[Any]]) -> dict[Any, np.ndarray]:
    """Maps each value to the images that have it, bool [n]; numbers sort before texts."""
    found = sorted(set(itertools.chain(*values)), key=lambda x: (isinstance(x, str), x))
    return {value: np.array([value in own for own in values]) for value in found}


def _describe(task: Task, encoded: EncodedImages, result: ClassificationResult) -> Measured:
    num_classes, per_class = len(result.classes.names), result.per_class()
    protocol = {
        "class_names_from": result.classes.origin,
        "label_field": task.label or "label",
        "templates": list(task.templates),
        "text_embedding": "normalised, averaged over the templates, normalised",
        "ties": "among equally similar classes the first in the list wins",
    }
    details: dict[str, Any] = {"per_class": per_class}
    if num_classes <= _MOST_CONFUSION_CLASSES:
        details["confusion"] = result.confusion().tolist()
    if result.splits:
        protocol["mean_over_splits"] = list(result.splits)
    if result.groups:
        protocol["group"] = task.options["group"]
        details["per_group"] = result.per_group()
    return Measured(
        encoded=encoded,
        num_items=len(result.ranks),
        measure=result.measure,
        protocol=protocol,
        counts={
            "images": len(result.ranks),
            **{f"images_of_split_{split}": int(x.sum()) for split, x in result.splits.items()},
            "classes": num_classes,
            "classes_without_images": sum(not entry["images"] for entry in per_class),
            "texts": num_classes * len(task.templates),
        },
        details=details,
        result=result,
    )


def zero_shot_classifier(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str],
    templates: Sequence[str],
    batching: Batching | None = None,
) -> np.ndarray:
    """Returns an embedding per class: the normalised mean of its normalised prompt embeddings.

    Args:
        encode_text: list of str -> float [b, d], normalised or not; called with one batch of texts
            at a time.
        class_names: C names.
        templates: each with one "{}".
        batching: None for the defaults.

    Returns:
        float32 [C, d], L2-normalised. The mean is taken in float64.
    """
    templates = check_templates(templates)
    if not len(class_names):
        raise ValueError("class_names: expected at least one class name, got none")
    prompts = [template.replace(CLASS_SLOT, name) for name in class_names for template in templates]
    batches = encode_text_batches(encode_text, prompts, batching)
    sums, start = np.zeros((len(class_names), 0), np.float64), 0
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
    """Computes the accuracy of nearest-class prediction.

    Args:
        image_emb: float [n, d], L2-normalised.
        labels: int [n], rows of `classifier`.
        classifier: float [C, d], L2-normalised.

    Returns:
        Fractions: `top1`; `top5` with more than 5 classes; `mean_per_class`, the mean accuracy of
        the classes that have images.

    Raises:
        ValueError: shapes or labels that do not fit, or embeddings that are not finite.
    """
    labels = np.asarray(labels)
    _, ranks = rank_labels(image_emb, labels, classifier)
    return metrics_of_ranks(ranks, labels, len(classifier), np.ones(len(labels), np.int64))


def rank_labels(
    image_emb: np.ndarray, labels: np.ndarray, classifier: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the predicted class and the rank of the right class for every image.

    Args and errors: as in `classification_metrics`.

    Returns:
        int32 [n] predictions; int32 [n] ranks, 0 if and only if the prediction is the label.
    """
    labels = np.asarray(labels, np.int32)
    if labels.shape != (len(image_emb),) or not len(labels):
        raise ValueError(
            f"labels: expected one per image, shape ({len(image_emb)},) and at least one, got "
            f"{labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= len(classifier):
        raise ValueError(
            f"labels: expected 0 to {len(classifier) - 1}, rows of the classifier; got "
            f"{labels.min()} to {labels.max()}"
        )
    check_finite(image_emb, "image embeddings")
    check_finite(classifier, "classifier")
    weights = jnp.asarray(classifier, jnp.float32)
    found = []
    for start in range(0, len(labels), _IMAGE_BLOCK):
        block = slice(start, start + _IMAGE_BLOCK)
        images = np.asarray(image_emb[block], np.float32)
        found.append(jax.device_get(_rank_block(images, labels[block], weights)))
    predictions, ranks = zip(*found, strict=True)
    return np.concatenate(predictions), np.concatenate(ranks)


@jax.jit
def _rank_block(
    image_emb: jax.Array, labels: jax.Array, classifier: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Full float32, since the default on TPUs rounds to bfloat16.
    logits = jnp.matmul(image_emb, classifier.T, precision=jax.lax.Precision.HIGHEST)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(len(classifier))[None, :] < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier)
    return jnp.argmax(logits, axis=1).astype(jnp.int32), before.sum(axis=1, dtype=jnp.int32)


def metrics_of_ranks(
    ranks: np.ndarray, labels: np.ndarray, num_classes: int, counts: np.ndarray
) -> dict[str, float]:
    """Computes `top1`; `top5` with more than 5 classes; and `mean_per_class`.

    Ranks are those of the right class, from 0; `counts` is the weight of each image.
    """
    hits = np.bincount(labels, counts * (ranks == 0), num_classes)
    totals = np.bincount(labels, counts, num_classes)
    seen = totals > 0
    metrics = {"top1": float(hits.sum() / totals.sum())}
    if num_classes > TOP_K:
        metrics["top5"] = float((counts * (ranks < TOP_K)).sum() / totals.sum())
    metrics["mean_per_class"] = float(np.mean(hits[seen] / totals[seen]))
    return metrics


def metrics_of_groups(
    ranks: np.ndarray, groups: Iterable[np.ndarray], num_classes: int, counts: np.ndarray
) -> dict[str, float]:
    """Computes `worst_group`, the lowest accuracy of a group (bool [n]), and `worst_group_top5`."""
    weights = [counts * inside for inside in groups if counts[inside].any()]

    def least(right: np.ndarray) -> float:
        return min(float(np.average(right, weights=own)) for own in weights)

    metrics = {"worst_group": least(ranks == 0)}
    if num_classes > TOP_K:
        metrics["worst_group_top5"] = least(ranks < TOP_K)
    return metrics


def f1_macro(predictions: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> float:
    """Computes the mean of 2 TP / (2 TP + FP + FN) over the classes that have images."""
    num_classes = int(max(predictions.max(), labels.max())) + 1
    right = np.bincount(labels, counts * (predictions == labels), num_classes)
    own = np.bincount(labels, counts, num_classes)
    taken = np.bincount(predictions, counts, num_classes)
    seen = own > 0
    return float(np.mean(2 * right[seen] / (own + taken)[seen]))


def _normalize(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


PROTOCOL = Protocol(
    run=run,
    metrics={
        "top1": Metric("share", "top-1"),
        "top5": Metric("share", "top-5"),
        "mean_per_class": Metric("share", "mean per class"),
        "worst_group": Metric("share", "top-1 of the worst group"),
        "worst_group_top5": Metric("share", "top-5 of the worst group"),
        "f1_macro": Metric("share", "macro F1"),
    },
    options={
        "class_names": read_class_names,
        "templates": parse_templates,
        "label": parse_text,
        "candidates": choice("candidates", "all", "with_images"),
        "group": str,  # the position may come as a number
        "f1": choice("f1", "macro"),
    },
)
