"""Winoground: two images and two captions with the same words; which belongs to which?

Thrush et al., arXiv 2204.03162, section "Metrics": the text score asks for each image's own caption
to be the more similar one, the image score for each caption's own image, the group score for both.
Equal similarities are wrong.
"""

from __future__ import annotations

import collections

import numpy as np

from diht_jax.evaluation import prompts
from diht_jax.evaluation.embedding.encoding import Encoder
from diht_jax.evaluation.protocols.base import CAPTION_TEMPLATE, Measured, Metric, Protocol, Task
from diht_jax.records.schema import Pair


def run(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and captions of `annotations.winoground_units`, and compares each example.

    Examples of which an image cannot be used are left out. Items are the examples.
    """

    def describe(pair: Pair) -> tuple[str, int, str]:
        text = prompts.fill_caption_template(task.prompt, pair.caption)
        return pair.metadata["example"], pair.metadata["side"], text

    encoded = encoder.images(describe)
    sides: dict[str, dict[int, int]] = collections.defaultdict(dict)
    for row, (example, side, _) in enumerate(encoded.notes):
        sides[example][side] = row
    complete = [(rows[0], rows[1]) for rows in sides.values() if len(rows) == 2]
    if not complete:
        raise ValueError("no example has two usable images")
    texts = [text for _, _, text in encoded.notes]
    text_emb = encoder.texts(texts)
    rows = np.array(complete)
    similarities = np.einsum("eid,ejd->eij", encoded.image_emb[rows], text_emb[rows])
    own = np.diagonal(similarities, axis1=1, axis2=2)
    # [image, caption]: along a row the image stays, along a column the caption.
    text_right = (own > similarities[:, [0, 1], [1, 0]]).all(axis=1)
    image_right = (own > similarities[:, [1, 0], [0, 1]]).all(axis=1)
    right = {"text": text_right, "image": image_right, "group": text_right & image_right}
    return Measured(
        encoded=encoded,
        num_items=len(complete),
        measure=lambda counts: {
            name: float(np.average(hits, weights=counts)) for name, hits in right.items()
        },
        protocol={
            "caption_template": task.caption_template,
            "text": "for each image its own caption is the more similar one, in both cases",
            "image": "for each caption its own image is the more similar one, in both cases",
            "group": "both; equal similarities are wrong",
        },
        counts={
            "images": len(encoded.notes),
            "examples": len(complete),
            "incomplete_examples": len(sides) - len(complete),
        },
    )


PROTOCOL = Protocol(
    run=run,
    metrics={
        "text": Metric("share", "text score"),
        "image": Metric("share", "image score"),
        "group": Metric("share", "group score"),
    },
    options={"caption_template": CAPTION_TEMPLATE},
    defaults={"caption_template": prompts.CAPTION_TEMPLATE},
    reader="winoground",
)
