"""Winoground: two images and two captions with the same words; which belongs to which?

Thrush et al., arXiv 2204.03162, section "Metrics": the text score asks for each image's own caption
to be the more similar one, the image score for each caption's own image, the group score for both.
Equal similarities are wrong.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import (
    EmbeddingModel,
    EncodedImages,
    encode_images,
    encode_texts,
)
from diht_jax.evaluation.prompts import fill_caption_template
from diht_jax.evaluation.protocols.base import CAPTION_TEMPLATE, Measured, Metric, Protocol, Task
from diht_jax.evaluation.sources.registry import WINOGROUND
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair


@dataclasses.dataclass(frozen=True)
class WinogroundResult:
    """What was found; e examples with both images.

    Attributes:
        encoded: the images, those of incomplete examples as well.
        text_right: bool [e].
        image_right: bool [e].
        incomplete: examples left out since one of their images cannot be used.
    """

    encoded: EncodedImages
    text_right: np.ndarray
    image_right: np.ndarray
    incomplete: int

    @property
    def num_items(self) -> int:
        """Independent items: the examples."""
        return len(self.text_right)

    @property
    def metrics(self) -> dict[str, float]:
        """Fractions: `text`, `image` and `group`."""
        return self.resampled_metrics(np.ones(self.num_items, np.int64))

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """The metrics if example i had been there `counts[i]` times; int [e]."""
        right = {
            "text": self.text_right,
            "image": self.image_right,
            "group": self.text_right & self.image_right,
        }
        return {name: float((counts * hits).sum() / counts.sum()) for name, hits in right.items()}


def evaluate_winoground(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    template: str,
    *,
    batch_size: int = 256,
    num_threads: int | None = None,
    progress: bool = False,
) -> WinogroundResult:
    """Embeds all images and captions, and compares the two of each example.

    Args:
        model: see `EmbeddingModel`.
        pairs: of `annotations.winoground_units`, consumed once.
        template: put around each caption.
        batch_size: images, and texts, a batch over all devices.
        num_threads: decoding threads; None is one per core.
        progress: show a bar for the texts on stderr.

    Raises:
        ValueError: a bad template, pairs of another source, no complete example.
    """

    def describe(pair: Pair) -> tuple[str, int, str]:
        if "example" not in pair.metadata or "side" not in pair.metadata:
            raise ValueError(f"record '{pair.key}': expected a source 'winoground:FILE'")
        text = fill_caption_template(template, pair.caption)
        return pair.metadata["example"], pair.metadata["side"], text

    encoded = encode_images(model, pairs, describe, batch_size=batch_size, num_threads=num_threads)
    sides: dict[str, dict[int, int]] = collections.defaultdict(dict)
    for row, (example, side, _) in enumerate(encoded.notes):
        sides[example][side] = row
    complete = [(rows[0], rows[1]) for rows in sides.values() if len(rows) == 2]
    if not complete:
        raise ValueError("no example has two usable images")
    texts = [text for _, _, text in encoded.notes]
    text_emb = encode_texts(model.encode_text, texts, batch_size=batch_size, progress=progress)
    rows = np.array(complete)
    similarities = np.einsum("eid,ejd->eij", encoded.image_emb[rows], text_emb[rows])
    own = np.diagonal(similarities, axis1=1, axis2=2)
    return WinogroundResult(
        encoded=encoded,
        # [image, caption]: along a row the image stays, along a column the caption.
        text_right=((own > similarities[:, [0, 1], [1, 0]]).all(axis=1)),
        image_right=((own > similarities[:, [1, 0], [0, 1]]).all(axis=1)),
        incomplete=len(sides) - len(complete),
    )


def _run(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], **batching: Any
) -> Measured:
    result = evaluate_winoground(model, entries, task.caption_template, **batching)
    return Measured(
        encoded=result.encoded,
        num_items=result.num_items,
        measure=result.resampled_metrics,
        protocol={
            "caption_template": task.caption_template,
            "text": "for each image its own caption is the more similar one, in both cases",
            "image": "for each caption its own image is the more similar one, in both cases",
            "group": "both; equal similarities are wrong",
        },
        counts={
            "images": len(result.encoded.positions),
            "examples": result.num_items,
            "incomplete_examples": result.incomplete,
        },
    )


PROTOCOL = Protocol(
    run=_run,
    metrics={
        "text": Metric("share", "text score"),
        "image": Metric("share", "image score"),
        "group": Metric("share", "group score"),
    },
    options={"caption_template": CAPTION_TEMPLATE},
    reader=WINOGROUND,
)
