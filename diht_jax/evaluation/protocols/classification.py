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
import itertools
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax import sharding
from diht_jax.data.readers.base import Skipped
from diht_jax.data.records.schema import Pair
from diht_jax.evaluation.embedding.encoding import (
    EmbeddingModel,
    EncodedImages,
    check_finite,
    encode_images,
    encode_texts,
)
from diht_jax.evaluation.pages.canvas import ImageLoader
from diht_jax.evaluation.pages.classification import draw_classification_page
from diht_jax.evaluation.prompts import CLASS_SLOT, check_templates, fill_template
from diht_jax.evaluation.protocols.base import (
    CLASS_NAMES,
    LABEL,
    TEMPLATES,
    Measured,
    Metric,
    Option,
    Protocol,
    Task,
    short_source,
)
from diht_jax.evaluation.protocols.class_names import (
    Classes,
    derive_classes,
    name_index,
    raw_label,
    resolve_label,
)

ALL_CLASSES, WITH_IMAGES = "all", "with_images"
TOP_K = 5
TIES = "among equally similar classes the first in the list wins"

# Images compared with all classes at once: a block is [images / devices, classes] float32.
_IMAGE_BLOCK = 4096
# A confusion matrix of more classes is left out of the results: they should stay readable.
_MOST_CONFUSION_CLASSES = 50


@dataclasses.dataclass(frozen=True)
class ClassificationResult:
    """What `classify` found; n images, C classes.

    Attributes:
        metrics: see `classification_metrics`.
        encoded: the images.
        classes: names and labels.
        templates: the ones used.
        classifier: float32 [C, d].
        predictions: int32 [n], the first class.
        ranks: int32 [n], the rank of the right class, 0 when it is the first.
        members: number of a test split -> bool [n], its images; empty where there are none.
    """

    metrics: dict[str, float]
    encoded: EncodedImages
    classes: Classes
    templates: tuple[str, ...]
    classifier: np.ndarray
    predictions: np.ndarray
    ranks: np.ndarray
    members: dict[int, np.ndarray] = dataclasses.field(default_factory=dict)

    def per_class(self) -> list[dict[str, str | int | float | None]]:
        """Name, number of images and accuracy of every class; None for one without images."""
        hits = np.bincount(self.classes.labels, self.ranks == 0, len(self.classes.names))
        totals = np.bincount(self.classes.labels, minlength=len(self.classes.names))
        return [
            {"class": name, "images": int(total), "accuracy": hit / total if total else None}
            for name, total, hit in zip(self.classes.names, totals, hits.tolist(), strict=True)
        ]

    @property
    def num_items(self) -> int:
        """Independent items: the images."""
        return len(self.ranks)

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """The metrics if image i had been there `counts[i]` times; int [n]."""
        return _metrics_of_splits(self.ranks, self.classes, self.members, counts)

    def confusion(self) -> np.ndarray:
        """int [C, C]: images of the class of the row that were taken for that of the column."""
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
    batch_size: int = 256,
    num_threads: int | None = None,
    progress: bool = False,
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
        batch_size: images, and prompts, a batch over all devices.
        num_threads: decoding threads; None is one per core.
        progress: show a bar for the prompts on stderr; `pairs` may be one itself.

    Raises:
        ValueError: a bad template, a label that cannot be resolved, no usable pair.
    """
    templates = check_templates(templates)
    names = None if class_names is None else tuple(class_names)
    index = None if names is None else name_index(names)

    def describe(pair: Pair) -> tuple[Any, tuple[int, ...]]:
        raw = raw_label(pair, label_field)
        label = raw if names is None else resolve_label(raw, names, index)
        return label, tuple(pair.metadata.get("splits", ()))

    encoded = encode_images(model, pairs, describe, batch_size=batch_size, num_threads=num_threads)
    labels, splits = zip(*encoded.notes, strict=True)
    if names is None:
        classes = derive_classes(labels, templates)
        if classes.whole_captions:
            templates = (CLASS_SLOT,)
    else:
        classes = Classes(names, np.array(labels, np.int32), "names given")
        if candidates == WITH_IMAGES:
            present, found = np.unique(classes.labels, return_inverse=True)
            chosen = tuple(names[label] for label in present)
            classes = Classes(chosen, found.astype(np.int32), "names given, of classes with images")
    members = {
        split: np.array([split in own for own in splits])
        for split in sorted(set(itertools.chain(*splits)))
    }
    classifier = zero_shot_classifier(
        model.encode_text, classes.names, templates, batch_size=batch_size, progress=progress
    )
    predictions, ranks = rank_labels(encoded.image_emb, classes.labels, classifier)
    return ClassificationResult(
        metrics=_metrics_of_splits(ranks, classes, members, np.ones(len(ranks), np.int64)),
        encoded=encoded,
        classes=classes,
        templates=templates,
        classifier=classifier,
        predictions=predictions,
        ranks=ranks,
        members=members,
    )


def zero_shot_classifier(
    encode_text: Callable[[Sequence[str]], np.ndarray],
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> np.ndarray:
    """One embedding per class: the normalised mean of the normalised embeddings of its prompts.

    Args:
        encode_text: list of str -> float [b, d], normalised or not; called with `batch_size`
            texts each time.
        class_names: C names.
        templates: T templates, each with one "{}".
        batch_size: prompts a call.
        progress: show a bar on stderr.

    Returns:
        float32 [C, d], L2-normalised. The mean is taken in float64.
    """
    templates = check_templates(templates)
    if not len(class_names):
        raise ValueError("class_names: expected at least one class name, got none")
    prompts = [fill_template(template, name) for name in class_names for template in templates]
    sums, start = None, 0
    for text_emb in encode_texts(encode_text, prompts, batch_size=batch_size, progress=progress):
        if sums is None:
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
    return _metrics_of_ranks(ranks, labels, len(classifier))


def rank_labels(
    image_emb: np.ndarray, labels: np.ndarray, classifier: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted class and the rank of the right class, for every image.

    Args and errors: as `classification_metrics`.

    Returns:
        int32 [n] predictions; int32 [n] ranks, 0 exactly where the prediction is the label.
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
    mesh = sharding.create_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    split = sharding.batch_sharding(mesh)
    block = -(-min(len(labels), _IMAGE_BLOCK) // mesh.size) * mesh.size
    weights = jax.device_put(np.asarray(classifier, np.float32), sharding.replicated(mesh))
    predictions, ranks = [], []
    for start in range(0, len(labels), block):
        images = np.asarray(image_emb[start : start + block], np.float32)
        missing = block - len(images)
        found = _rank_block(
            jax.device_put(np.pad(images, ((0, missing), (0, 0))), split),
            jax.device_put(np.pad(labels[start : start + block], (0, missing)), split),
            weights,
        )
        block_predictions, block_ranks = (np.asarray(x)[: len(images)] for x in found)
        predictions.append(block_predictions)
        ranks.append(block_ranks)
    return np.concatenate(predictions), np.concatenate(ranks)


@jax.jit
def _rank_block(
    image_emb: jax.Array, labels: jax.Array, classifier: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # Full float32: the default on TPUs would round to bfloat16.
    logits = jnp.matmul(image_emb, classifier.T, precision=jax.lax.Precision.HIGHEST)
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    earlier = jnp.arange(len(classifier))[None, :] < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier)
    return jnp.argmax(logits, axis=1).astype(jnp.int32), before.sum(axis=1, dtype=jnp.int32)


def _metrics_of_splits(
    ranks: np.ndarray, classes: Classes, members: dict[int, np.ndarray], counts: np.ndarray
) -> dict[str, float]:
    """The means over the test splits; an image that is in none counts where there are none."""
    found = [
        _metrics_of_ranks(ranks, classes.labels, len(classes.names), weights=counts * inside)
        for inside in members.values() or [np.ones(len(ranks), np.int64)]
    ]
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def _metrics_of_ranks(
    ranks: np.ndarray, labels: np.ndarray, num_classes: int, *, weights: np.ndarray | None = None
) -> dict[str, float]:
    weights = np.ones(len(ranks), np.int64) if weights is None else weights
    hits = np.bincount(labels, weights * (ranks == 0), num_classes)
    totals = np.bincount(labels, weights, num_classes)
    seen = totals > 0
    metrics = {"top1": float(hits.sum() / totals.sum())}
    if num_classes > TOP_K:
        metrics["top5"] = float((weights * (ranks < TOP_K)).sum() / totals.sum())
    metrics["mean_per_class"] = float(np.mean(hits[seen] / totals[seen]))
    return metrics


def _normalize(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _run(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], **batching: Any
) -> Measured:
    result = classify(
        model,
        entries,
        task.class_names,
        task.templates,
        label_field=task.label_field,
        candidates=task.options.get("candidates", ALL_CLASSES),
        **batching,
    )
    names, per_class = result.classes.names, result.per_class()
    details: dict[str, Any] = {"per_class": per_class}
    if len(names) <= _MOST_CONFUSION_CLASSES:
        details["confusion"] = result.confusion().tolist()

    def draw(path: pathlib.Path, load_images: ImageLoader) -> None:
        number = len(result.templates)
        prompt = f"{number} prompts" if number > 1 else f"prompt “{result.templates[0]}”"
        draw_classification_page(
            result,
            load_images,
            path,
            logit_scale=model.logit_scale,
            title=f"Classification: {task.name}",
            note=(
                f"{len(result.predictions):,} images of {short_source(task.source)}, "
                f"{len(names):,} classes, {prompt}. Green is right, red is wrong."
            ),
        )

    return Measured(
        encoded=result.encoded,
        metrics=result.metrics,
        protocol={
            "class_names_from": result.classes.origin,
            "label_field": task.label_field or "label",
            "templates": list(result.templates),
            "text_embedding": "normalised, averaged over the templates, normalised",
            "ties": TIES,
            **({"mean_over_splits": list(result.members)} if result.members else {}),
        },
        counts={
            "images": len(result.predictions),
            **{f"images_of_split_{split}": int(x.sum()) for split, x in result.members.items()},
            "classes": len(names),
            "classes_without_images": sum(not entry["images"] for entry in per_class),
            "texts": len(names) * len(result.templates),
        },
        num_items=result.num_items,
        resample=result.resampled_metrics,
        details=details,
        draw=draw,
    )


def _parse_candidates(value: Any) -> str:
    if value not in (ALL_CLASSES, WITH_IMAGES):
        raise ValueError(f"candidates={value}: expected {ALL_CLASSES} or {WITH_IMAGES}")
    return value


PROTOCOL = Protocol(
    run=_run,
    metrics={
        "top1": Metric("share", "top-1"),
        "top5": Metric("share", "top-5"),
        "mean_per_class": Metric("share", "mean per class"),
    },
    options={
        "class_names": CLASS_NAMES,
        "templates": TEMPLATES,
        "label": LABEL,
        "candidates": Option(_parse_candidates),
    },
)
