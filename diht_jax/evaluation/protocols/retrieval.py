"""Image-text retrieval: recall at K in both directions, with several captions per image.

The protocol is the one of DiHT (arXiv 2301.02280, section "Evaluation") and of its official
inference code. Our own rule for ties: a wrong item ranks before an equally similar right one.
`equal_captions=right` makes a caption right for every image that has the same caption.

Similarities are computed in blocks on the device; the full matrix never exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax.evaluation.embedding.encoding import Encoder, UnusablePair, check_finite
from diht_jax.evaluation.protocols.base import (
    Measured,
    Metric,
    Protocol,
    Task,
    choice,
    fill_caption_template,
    parse_text,
)
from diht_jax.records.schema import Pair

RECALL_AT = (1, 5, 10)

# Similarities on the device at once, float32: 64 MiB.
_BLOCK = 2**24


class RetrievalResult(NamedTuple):
    """The ranks for n images and m captions."""

    captions: list[str]  # m captions, without the template
    text_emb: np.ndarray  # float32 [m, d]
    text_ids: np.ndarray  # int32 [m, 1], equal for captions that count as the same
    image_ids: np.ndarray  # int32 [n, k], the `text_ids` that are right for an image; -1 is padding
    t2i_ranks: np.ndarray  # int [m], 0 if a right image comes first
    i2t_ranks: np.ndarray  # int [n], 0 if a right caption comes first


def run(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and captions, measures both directions; resampled items are the images.

    `Measured.result` is a `RetrievalResult`; the notes of the images are their captions.
    """
    encoded = encoder.images(captions_of)
    captions = list(itertools.chain(*encoded.notes))
    num_images = len(encoded.notes)
    image_of_text = np.repeat(np.arange(num_images, dtype=np.int32), list(map(len, encoded.notes)))
    texts = [fill_caption_template(task.prompt, caption) for caption in captions]
    # Equal texts are encoded once, which saves work and makes their ties exact.
    index_of_text = dict(zip(dict.fromkeys(texts), itertools.count(), strict=False))
    unique_emb = encoder.texts(list(index_of_text))
    text_emb = unique_emb[[index_of_text[text] for text in texts]]
    # Captions that are equal except for case and spaces have the same number.
    plain = np.array([" ".join(caption.lower().split()) for caption in captions], object)
    numbers = np.unique(plain, return_inverse=True)[1].astype(np.int32)
    _, numbers_of_image = answer_ids(image_of_text, numbers)
    images_with = np.bincount(numbers_of_image[numbers_of_image >= 0])
    equal_captions = task.options.get("equal_captions", "wrong")
    counted = numbers if equal_captions == "right" else None
    t2i_ranks, i2t_ranks = retrieval_ranks(encoded.image_emb, text_emb, image_of_text, counted)
    return Measured(
        encoded=encoded,
        num_items=len(i2t_ranks),
        measure=lambda counts: metrics_of_ranks(
            np.repeat(t2i_ranks, counts[image_of_text]), np.repeat(i2t_ranks, counts)
        ),
        protocol={
            "caption_template": task.caption_template,
            "text_to_image": "every caption is a query, its own image the only right answer",
            "image_to_text": "right when any caption of the image comes first",
            "equal_captions": f"{equal_captions}, where they belong to another image",
            "ties": "a wrong item as similar as the right one ranks before it",
        },
        counts={
            "images": len(i2t_ranks),
            "texts": len(t2i_ranks),
            "different_texts": len(index_of_text),
            "equal_captions": int((images_with[numbers] > 1).sum()),
        },
        result=RetrievalResult(
            captions, text_emb, *answer_ids(image_of_text, counted), t2i_ranks, i2t_ranks
        ),
    )


def answer_ids(
    image_of_text: np.ndarray, text_numbers: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids of texts, int32 [m, 1], and of images, int32 [n, k], padded with -1.

    A text and an image that share an id match. Texts with equal numbers [m] are interchangeable;
    without numbers each text matches its own image alone.
    """
    text_ids = np.asarray(image_of_text if text_numbers is None else text_numbers, np.int32)
    pairs: np.ndarray = np.unique(np.stack([image_of_text, text_ids], axis=1), axis=0)
    sizes = np.bincount(pairs[:, 0])
    columns = np.arange(len(pairs)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    image_ids = np.full((len(sizes), sizes.max()), -1, np.int32)
    image_ids[pairs[:, 0], columns] = pairs[:, 1]
    return text_ids[:, None], image_ids


def have_common_id(ids: Any, other_ids: Any) -> Any:
    """Returns whether ids [q, k] and [g, l] share one, bool [q, g]; for NumPy or JAX arrays."""
    return (ids[:, None, :, None] == other_ids[None, :, None, :]).any(axis=(2, 3))


def captions_of(pair: Pair) -> tuple[str, ...]:
    """Returns the non-blank captions of a pair; raises `UnusablePair` if there are none.

    They come from `metadata["captions"]`, or else from `caption`.
    """
    captions = map(str, pair.metadata.get("captions") or [pair.caption])
    captions = tuple(filter(str.strip, captions))
    if not captions:
        raise UnusablePair("no_caption")
    return captions


def retrieval_metrics(
    image_emb: np.ndarray, text_emb: np.ndarray, image_of_text: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """Computes recall at 1, 5 and 10 and the median rank in both directions.

    Args:
        image_emb: float [n, d], L2-normalised.
        text_emb: float [m, d], L2-normalised.
        image_of_text: int [m], the image of each text; every image needs at least one text.

    Returns:
        `t2i_rK` and `i2t_rK` (K = 1, 5, 10) as fractions of the m texts and of the n images,
        `t2i_median_rank` and `i2t_median_rank` counted from 1.

    Raises:
        ValueError: shapes that do not fit, an image without text, or embeddings not finite.
    """
    return metrics_of_ranks(*retrieval_ranks(image_emb, text_emb, image_of_text))


def retrieval_ranks(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    image_of_text: Sequence[int] | np.ndarray,
    text_numbers: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Counts the wrong items that rank at or above the best right item, for every query.

    Args and errors: as in `retrieval_metrics` and `answer_ids`.

    Returns:
        int32 [m] for the texts as queries, int32 [n] for the images as queries.
    """
    image_of_text = np.asarray(image_of_text, np.int32)
    num_images, num_texts = len(image_emb), len(text_emb)
    if image_of_text.shape != (num_texts,):
        raise ValueError(
            f"image_of_text: expected shape ({num_texts},), one image per text, "
            f"got {image_of_text.shape}"
        )
    if num_texts and not 0 <= image_of_text.min() <= image_of_text.max() < num_images:
        raise ValueError(
            f"image_of_text: expected indices of the {num_images} images, "
            f"got {image_of_text.min()} to {image_of_text.max()}"
        )
    lonely = np.setdiff1d(np.arange(num_images), image_of_text)
    if len(lonely) or not num_images:
        raise ValueError(
            f"{len(lonely)} of {num_images} images have no text (first: {lonely[:3].tolist()}); "
            "every image needs at least one"
        )
    check_finite(image_emb, "image embeddings")
    check_finite(text_emb, "text embeddings")
    text_ids, image_ids = answer_ids(image_of_text, text_numbers)
    return (
        _rank_queries(text_emb, text_ids, image_emb, image_ids),
        _rank_queries(image_emb, image_ids, text_emb, text_ids),
    )


def metrics_of_ranks(t2i_ranks: np.ndarray, i2t_ranks: np.ndarray) -> dict[str, float]:
    """Computes the metrics of `retrieval_metrics` from ranks that start at 0."""
    metrics = {}
    for direction, ranks in (("t2i", t2i_ranks), ("i2t", i2t_ranks)):
        for k in RECALL_AT:
            metrics[f"{direction}_r{k}"] = float(np.mean(ranks < k))
        metrics[f"{direction}_median_rank"] = float(np.median(ranks) + 1)
    return metrics


def _rank_queries(
    queries: np.ndarray, query_ids: np.ndarray, gallery: np.ndarray, gallery_ids: np.ndarray
) -> np.ndarray:
    """Counts wrong gallery items at least as similar as the best right item, int32 [q].

    Ids are [q, k] and [g, l], as in `answer_ids`.
    """
    items = jnp.asarray(gallery, jnp.float32)
    item_ids = jnp.asarray(gallery_ids, jnp.int32)
    size = max(1, min(len(queries), _BLOCK // len(gallery)))
    ranks = []
    for start in range(0, len(queries), size):
        # The last block overlaps the one before, so that all blocks have the same shape.
        rows = slice(min(start, len(queries) - size), start + size)
        block = jnp.asarray(queries[rows], jnp.float32)
        found = np.asarray(_rank_block(block, query_ids[rows], items, item_ids))
        ranks.append(found[start - rows.start :])
    return np.concatenate(ranks)


@jax.jit
def _rank_block(
    queries: jax.Array, query_ids: jax.Array, gallery: jax.Array, gallery_ids: jax.Array
) -> jax.Array:
    # Full float32, since the default on TPUs rounds to bfloat16 and creates ties.
    similarities = jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)
    right = have_common_id(query_ids, gallery_ids)
    best = jnp.where(right, similarities, -jnp.inf).max(axis=1, keepdims=True)
    return jnp.sum(~right & (similarities >= best), axis=1, dtype=jnp.int32)


_METRICS = {f"r{k}": Metric("share", f"R@{k}") for k in RECALL_AT} | {
    "median_rank": Metric("rank", "median rank")
}
PROTOCOL = Protocol(
    run=run,
    metrics={
        f"{direction}_{name}": Metric(metric.unit, f"{arrow} {metric.label}")
        for direction, arrow in (("t2i", "text to image"), ("i2t", "image to text"))
        for name, metric in _METRICS.items()
    },
    options={
        "caption_template": parse_text,
        "equal_captions": choice("equal_captions", "wrong", "right"),
    },
)
