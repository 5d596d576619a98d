"""Image-text retrieval: recall at K in both directions, with several captions per image.

The protocol is the one of DiHT (arXiv 2301.02280, section "Evaluation") and of its official
inference code: every caption is a text-to-image query whose one right answer is its own image; an
image-to-text query is right when any of the image's captions comes first.

Ours, ties: a wrong item that is exactly as similar as the right one ranks before it. So a model
that gives everything one embedding scores 0, and of two images with the same caption both
image-to-text queries miss at rank 1.

Similarities exist only as blocks on the device, never as the full matrix of queries and gallery.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax import sharding
from diht_jax.evaluation.embedding.encoding import (
    Batching,
    EmbeddingModel,
    EncodedImages,
    UnusablePair,
    check_finite,
    encode_images,
    encode_texts,
)
from diht_jax.evaluation.prompts import fill_caption_template
from diht_jax.evaluation.protocols.base import (
    CAPTION_TEMPLATE,
    Measured,
    Metric,
    Protocol,
    Task,
)
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

RECALL_AT = (1, 5, 10)
TIES = "a wrong item as similar as the right one ranks before it"

# One block of similarities is [queries / devices, gallery] float32: at most 16 MiB on a device.
_QUERY_BLOCK = 1024
_GALLERY_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
    """Result of `retrieve`; n images, m captions.

    Attributes:
        encoded: the images; `notes` holds the captions of each one.
        captions: m captions, before the template.
        text_emb: float32 [m, d].
        image_of_text: int32 [m], index of each caption's image.
        t2i_ranks: int [m], 0 when the right image comes first.
        i2t_ranks: int [n], 0 when one of the image's captions comes first.
        num_unique_texts: how many different texts were encoded.
    """

    encoded: EncodedImages
    captions: list[str]
    text_emb: np.ndarray
    image_of_text: np.ndarray
    t2i_ranks: np.ndarray
    i2t_ranks: np.ndarray
    num_unique_texts: int

    @property
    def metrics(self) -> dict[str, float]:
        """See `retrieval_metrics`."""
        return _metrics_of_ranks(self.t2i_ranks, self.i2t_ranks)

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """The metrics if image i and its captions had been asked `counts[i]` times; int [n]."""
        return _metrics_of_ranks(
            np.repeat(self.t2i_ranks, counts[self.image_of_text]),
            np.repeat(self.i2t_ranks, counts),
        )


def retrieve(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    template: str,
    *,
    batching: Batching | None = None,
) -> RetrievalResult:
    """Embeds all images and captions of `pairs` and measures retrieval both ways.

    Args:
        model: see `EmbeddingModel`.
        pairs: consumed once. `metadata["captions"]` holds all captions of an image; without it
            `caption` is the only one. Blank ones are no queries.
        template: put around each caption, such as "a photo of {caption}."; "{caption}" for none.
        batching: the defaults where None.

    Raises:
        ValueError: a template without "{caption}", or no usable pair.
    """
    fill_caption_template(template, "")  # a bad template must fail before the images are encoded
    encoded = encode_images(model, pairs, captions_of, batching)
    captions = [caption for note in encoded.notes for caption in note]
    image_of_text = np.repeat(
        np.arange(len(encoded.notes), dtype=np.int32), [len(note) for note in encoded.notes]
    )
    texts = [fill_caption_template(template, caption) for caption in captions]
    # Equal texts are encoded once: it saves work, and a tie between them is then an exact tie.
    index_of_text = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    unique_emb = encode_texts(model.encode_text, list(index_of_text), batching)
    text_emb = unique_emb[[index_of_text[text] for text in texts]]
    t2i_ranks, i2t_ranks = retrieval_ranks(encoded.image_emb, text_emb, image_of_text)
    return RetrievalResult(
        encoded=encoded,
        captions=captions,
        text_emb=text_emb,
        image_of_text=image_of_text,
        t2i_ranks=t2i_ranks,
        i2t_ranks=i2t_ranks,
        num_unique_texts=len(index_of_text),
    )


def captions_of(pair: Pair) -> tuple[str, ...]:
    """All captions of a pair that are not blank; raises `UnusablePair` where there is none."""
    captions = pair.metadata.get("captions") or [pair.caption]
    captions = tuple(str(caption) for caption in captions if str(caption).strip())
    if not captions:
        raise UnusablePair("no_caption")
    return captions


def retrieval_metrics(
    image_emb: np.ndarray, text_emb: np.ndarray, image_of_text: Sequence[int] | np.ndarray
) -> dict[str, float]:
    """Recall at 1, 5 and 10 and the median rank, text to image and image to text.

    Args:
        image_emb: float [n, d], L2-normalised.
        text_emb: float [m, d], L2-normalised.
        image_of_text: int [m], the image each text belongs to; every image needs at least one.

    Returns:
        `t2i_rK` and `i2t_rK` (K = 1, 5, 10) as fractions of the m texts and of the n images,
        `t2i_median_rank` and `i2t_median_rank` counted from 1.

    Raises:
        ValueError: shapes that do not fit, an image without text, embeddings not finite.
    """
    return _metrics_of_ranks(*retrieval_ranks(image_emb, text_emb, image_of_text))


def retrieval_ranks(
    image_emb: np.ndarray, text_emb: np.ndarray, image_of_text: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The number of wrong items at or above the best right one, for every query.

    Args and errors: as `retrieval_metrics`.

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
    image_ids = np.arange(num_images, dtype=np.int32)
    t2i_ranks = _rank_queries(text_emb, image_of_text, image_emb, image_ids)
    i2t_ranks = _rank_queries(image_emb, image_ids, text_emb, image_of_text)
    return t2i_ranks, i2t_ranks


def _metrics_of_ranks(t2i_ranks: np.ndarray, i2t_ranks: np.ndarray) -> dict[str, float]:
    metrics = {}
    for direction, ranks in (("t2i", t2i_ranks), ("i2t", i2t_ranks)):
        for k in RECALL_AT:
            metrics[f"{direction}_r{k}"] = float(np.mean(ranks < k))
        metrics[f"{direction}_median_rank"] = float(np.median(ranks) + 1)
    return metrics


def _rank_queries(
    queries: np.ndarray, query_ids: np.ndarray, gallery: np.ndarray, gallery_ids: np.ndarray
) -> np.ndarray:
    """int32 [q]: wrong gallery items not less similar than the best right one."""
    mesh = sharding.create_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    query_block = _block_size(len(queries), _QUERY_BLOCK, multiple=8 * mesh.size)
    gallery_block = _block_size(len(gallery), _GALLERY_BLOCK, multiple=128)
    gallery = _pad_rows(np.asarray(gallery, np.float32), gallery_block, fill=0)
    gallery_ids = _pad_rows(np.asarray(gallery_ids, np.int32), gallery_block, fill=-1)
    gallery = jax.device_put(gallery.reshape(-1, gallery_block, gallery.shape[-1]), whole)
    gallery_ids = jax.device_put(gallery_ids.reshape(-1, gallery_block), whole)
    ranks = []
    for start in range(0, len(queries), query_block):
        block = np.asarray(queries[start : start + query_block], np.float32)
        ids = np.asarray(query_ids[start : start + query_block], np.int32)
        block_ranks = _rank_block(
            jax.device_put(_pad_rows(block, query_block, fill=0), split),
            jax.device_put(_pad_rows(ids, query_block, fill=-2), split),
            gallery,
            gallery_ids,
        )
        ranks.append(np.asarray(block_ranks)[: len(block)])
    return np.concatenate(ranks)


@jax.jit
def _rank_block(
    queries: jax.Array, query_ids: jax.Array, gallery: jax.Array, gallery_ids: jax.Array
) -> jax.Array:
    """Ranks of queries [q, d] against a gallery [blocks, g, d]; padding has id -1 there.

    Two passes: the best right similarity first, then the count. Both read it from the same
    product of matrices, so that equal items compare as equal.
    """

    def similarities(block: jax.Array) -> jax.Array:
        # Full float32: the default on TPUs would round to bfloat16 and make ties.
        return jnp.matmul(queries, block.T, precision=jax.lax.Precision.HIGHEST)

    def find_best(best: jax.Array, block: tuple[jax.Array, jax.Array]):
        items, ids = block
        right = query_ids[:, None] == ids[None, :]
        return jnp.maximum(best, jnp.where(right, similarities(items), -jnp.inf).max(1)), None

    def count_wrong(rank: jax.Array, block: tuple[jax.Array, jax.Array]):
        items, ids = block
        wrong = (query_ids[:, None] != ids[None, :]) & (ids >= 0)[None, :]
        not_below = similarities(items) >= best[:, None]
        return rank + jnp.sum(wrong & not_below, axis=1, dtype=jnp.int32), None

    lowest = jnp.full(len(queries), -jnp.inf, jnp.float32)
    best, _ = jax.lax.scan(find_best, lowest, (gallery, gallery_ids))
    ranks, _ = jax.lax.scan(count_wrong, jnp.zeros(len(queries), jnp.int32), (gallery, gallery_ids))
    return ranks


def _block_size(count: int, largest: int, *, multiple: int) -> int:
    """A block no longer than needed for `count` rows, a multiple of `multiple`."""
    return -(-min(count, largest) // multiple) * multiple


def _pad_rows(array: np.ndarray, multiple: int, *, fill: int) -> np.ndarray:
    missing = -len(array) % multiple
    widths = [(0, missing)] + [(0, 0)] * (array.ndim - 1)
    return np.pad(array, widths, constant_values=fill)


def _run(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], batching: Batching
) -> Measured:
    result = retrieve(model, entries, task.caption_template, batching=batching)
    return Measured(
        encoded=result.encoded,
        num_items=len(result.i2t_ranks),
        measure=result.resampled_metrics,
        protocol={
            "caption_template": task.caption_template,
            "text_to_image": "every caption is a query, its own image the only right answer",
            "image_to_text": "right when any caption of the image comes first",
            "ties": TIES,
        },
        counts={
            "images": len(result.i2t_ranks),
            "texts": len(result.t2i_ranks),
            "different_texts": result.num_unique_texts,
        },
        result=result,
    )


PROTOCOL = Protocol(
    run=_run,
    metrics={
        f"{direction}_{name}": Metric(unit, f"{arrow} {label}")
        for direction, arrow in (("t2i", "text to image"), ("i2t", "image to text"))
        for name, unit, label in [
            *((f"r{k}", "share", f"R@{k}") for k in RECALL_AT),
            ("median_rank", "rank", "median rank"),
        ]
    },
    options={"caption_template": CAPTION_TEMPLATE},
)
