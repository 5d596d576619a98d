"""The ranks of the right classes, and the metrics of a classification from them, with weights.

A weight is how often an image counts: once, or in a resample some times or never. Those over all
images are CLIP's; the accuracy of the worst group and the macro F1 are those of WILDS (arXiv
2012.07421, `wilds.common.metrics` 2.0), which DataComp (arXiv 2304.14108) reports on its sets with
metadata: a group without images, and a class without images, count for nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax import sharding
from diht_jax.evaluation.embedding.encoding import check_finite
from diht_jax.records.schema import Pair

TOP_K = 5
# Images compared with all classes at once: a block is [images / devices, classes] float32.
_IMAGE_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class Groups:
    """The group of each of n images, such as the region where it was taken.

    Attributes:
        names: G of them, sorted; numbers or texts as the data have them.
        numbers: int [n], 0 to G - 1.
    """

    names: tuple[int | str, ...]
    numbers: np.ndarray

    @classmethod
    def of(cls, values: Sequence[int | str]) -> Groups:
        """Those of a value for each image."""
        names = sorted(set(values), key=lambda value: (isinstance(value, str), value))
        index = {name: number for number, name in enumerate(names)}
        return cls(tuple(names), np.array([index[value] for value in values], np.int64))


def read_group(pair: Pair, field: str) -> int | str:
    """The group of an image: a field of its metadata, or the number at a position of its KEY.npy.

    Args:
        pair: of any source; in CLIP_benchmark's layout `metadata["numbers"]` are those of KEY.npy.
        field: a name, or a position from 0.

    Raises:
        ValueError: the image has no such field, or one that is no text and no whole number.
    """
    if field.isdecimal():
        numbers = pair.metadata.get("numbers", ())
        value = numbers[int(field)] if int(field) < len(numbers) else None
        has = f"{len(numbers)} numbers in its npy"
    else:
        value, has = pair.metadata.get(field), f"{sorted(pair.metadata) or 'no metadata'}"
    if value is None:
        raise ValueError(f"record '{pair.key}' has no group '{field}'; it has {has}")
    if isinstance(value, str):
        return value
    try:
        group = int(value)
    except (TypeError, ValueError, OverflowError):
        group = None
    if group is None or group != value:
        raise ValueError(
            f"record '{pair.key}': expected group '{field}' to be a text or a whole number, got "
            f"{value!r:.80}"
        )
    return group


def metrics_of_ranks(
    ranks: np.ndarray, labels: np.ndarray, num_classes: int, weights: np.ndarray
) -> dict[str, float]:
    """`top1`; `top5`, when there are more than 5 classes; `mean_per_class`.

    Args:
        ranks: int [n], the rank of the right class, from 0.
        labels: int [n].
        num_classes: C.
        weights: [n].
    """
    hits = np.bincount(labels, weights * (ranks == 0), num_classes)
    totals = np.bincount(labels, weights, num_classes)
    seen = totals > 0
    metrics = {"top1": float(hits.sum() / totals.sum())}
    if num_classes > TOP_K:
        metrics["top5"] = float((weights * (ranks < TOP_K)).sum() / totals.sum())
    metrics["mean_per_class"] = float(np.mean(hits[seen] / totals[seen]))
    return metrics


def metrics_of_splits(
    ranks: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    members: Iterable[np.ndarray],
    weights: np.ndarray,
) -> dict[str, float]:
    """The means of `metrics_of_ranks` over test splits.

    Args:
        ranks: see `metrics_of_ranks`.
        labels: see `metrics_of_ranks`.
        num_classes: C.
        weights: [n].
        members: bool [n] for each split, its images; without any, all images are one split.
    """
    found = [
        metrics_of_ranks(ranks, labels, num_classes, weights * inside)
        for inside in list(members) or [np.ones(len(ranks), np.int64)]
    ]
    return {name: float(np.mean([metrics[name] for metrics in found])) for name in found[0]}


def metrics_of_groups(
    ranks: np.ndarray, groups: Groups, num_classes: int, weights: np.ndarray
) -> dict[str, float]:
    """`worst_group`, the least accuracy of a group, and `worst_group_top5` (as `top5`)."""
    totals = np.bincount(groups.numbers, weights, len(groups.names))
    seen = totals > 0

    def least(right: np.ndarray) -> float:
        hits = np.bincount(groups.numbers, weights * right, len(groups.names))
        return float((hits[seen] / totals[seen]).min())

    metrics = {"worst_group": least(ranks == 0)}
    if num_classes > TOP_K:
        metrics["worst_group_top5"] = least(ranks < TOP_K)
    return metrics


def describe_groups(ranks: np.ndarray, groups: Groups) -> list[dict[str, Any]]:
    """Name, number of images, and the shares of right ones at rank 1 and within 5, by group."""
    found = []
    for number, name in enumerate(groups.names):
        own = ranks[groups.numbers == number]
        found.append(
            {
                "group": name,
                "images": len(own),
                "top1": float(np.mean(own == 0)),
                "top5": float(np.mean(own < TOP_K)),
            }
        )
    return found


def f1_macro(predictions: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> float:
    """The mean of 2 TP / (2 TP + FP + FN) over the classes that have images.

    Args:
        predictions: int [n].
        labels: int [n].
        weights: [n].
    """
    num_classes = int(max(predictions.max(), labels.max())) + 1
    right = np.bincount(labels, weights * (predictions == labels), num_classes)
    own = np.bincount(labels, weights, num_classes)
    taken = np.bincount(predictions, weights, num_classes)
    seen = own > 0
    return float(np.mean(2 * right[seen] / (own + taken)[seen]))


def rank_labels(
    image_emb: np.ndarray, labels: np.ndarray, classifier: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The predicted class and the rank of the right class, for every image.

    Args:
        image_emb: float [n, d], L2-normalised.
        labels: int [n], rows of `classifier`.
        classifier: float [C, d], L2-normalised.

    Returns:
        int32 [n] predictions; int32 [n] ranks, 0 exactly where the prediction is the label.

    Raises:
        ValueError: shapes or labels that do not fit, embeddings not finite.
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
