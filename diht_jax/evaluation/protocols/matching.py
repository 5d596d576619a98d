"""Matching a few images with words: Winoground and WinoGAViL.

Winoground is measured as in Thrush et al. (arXiv 2204.03162, section "Metrics"), WinoGAViL (Bitton
et al., arXiv 2207.12576) as in DataComp (`eval_utils/wino_eval.py`). Our own rule for ties in
WinoGAViL: an image that is no association ranks before an equally similar one that is.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import Encoder
from diht_jax.evaluation.protocols.base import (
    PHOTO_TEMPLATE,
    Measured,
    Metric,
    Protocol,
    Task,
    fill_caption_template,
    parse_text,
)
from diht_jax.records.schema import Pair

_FEW, _MANY = 6, 10  # WinoGAViL: maximum candidates of small games, minimum of large ones


def run_winoground(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and captions of `annotations.winoground_units` and scores each example.

    Examples with an unusable image are left out. Resampled items are the examples.
    """

    def describe(pair: Pair) -> tuple[int, int, str]:
        text = fill_caption_template(task.prompt, pair.caption)
        return pair.metadata["example"], pair.metadata["side"], text

    encoded = encoder.images(describe)
    sides: dict[int, dict[int, int]] = defaultdict(dict)
    for row, (example, side, _) in enumerate(encoded.notes):
        sides[example][side] = row
    complete = [(rows[0], rows[1]) for rows in sides.values() if len(rows) == 2]
    if not complete:
        raise ValueError("no example has two usable images")
    text_emb = encoder.texts([text for _, _, text in encoded.notes])
    rows = np.array(complete)
    similarities = np.einsum("eid,ejd->eij", encoded.image_emb[rows], text_emb[rows])
    own = np.diagonal(similarities, axis1=1, axis2=2)
    # Axes are [image, caption].
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


def run_winogavil(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and cues of `annotations.winogavil_units` and predicts each game.

    Games with an unusable image are left out. Resampled items are the games.
    """
    encoded = encoder.images(lambda pair: pair.metadata["games"])
    games: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for row, own in enumerate(encoded.notes):
        for game in own:
            games[game["game"]].append((row, game))
    complete = [own for _, own in sorted(games.items()) if len(own) == own[0][1]["candidates"]]
    if not complete:
        raise ValueError("no game of which all images can be used")
    cues = list(dict.fromkeys(own[0][1]["cue"] for own in complete))
    text_of = dict(zip(cues, encoder.texts([cue_prompt(cue) for cue in cues]), strict=True))
    found = []
    for own in complete:
        is_association = np.array([game["is_association"] for _, game in own])
        similarities = encoded.image_emb[[row for row, _ in own]] @ text_of[own[0][1]["cue"]]
        found.append(jaccard_index(similarities, is_association))
    jaccard, candidates = np.array(found), np.array([len(own) for own in complete])
    parts = {
        "jaccard_10_12": candidates >= _MANY,
        "jaccard_5_6": candidates <= _FEW,
        "jaccard": np.ones(len(jaccard), bool),
    }

    def measure(counts: np.ndarray) -> dict[str, float]:
        # A small resample may lack games of a size, which then have no mean.
        return {
            name: float(np.average(jaccard, weights=counts * part))
            if counts[part].any()
            else float("nan")
            for name, part in parts.items()
            if part.any()
        }

    return Measured(
        encoded=encoded,
        num_items=len(jaccard),
        measure=measure,
        protocol={
            "prompt": "'A' or 'An' before the cue in lower case",
            "score": "Jaccard index of the associations and as many of the most similar images",
            "ties": "an image that is no association comes first",
        },
        counts={
            "images": len(encoded.notes),
            "games": len(jaccard),
            "incomplete_games": len(games) - len(complete),
        },
    )


def cue_prompt(cue: str) -> str:
    """Returns the cue in lower case with its article, which depends on the first letter."""
    cue = cue.lower()
    return f"{'An' if cue[:1] in 'aeiou' else 'A'} {cue}"


def jaccard_index(similarities: np.ndarray, is_association: np.ndarray) -> float:
    """Computes the Jaccard index of the k associated images and the k most similar images."""
    number = int(is_association.sum())
    chosen = np.lexsort((is_association, -similarities))[:number]
    common = int(is_association[chosen].sum())
    return common / (2 * number - common)


WINOGROUND = Protocol(
    run=run_winoground,
    metrics={
        "text": Metric("share", "text score"),
        "image": Metric("share", "image score"),
        "group": Metric("share", "group score"),
    },
    options={"caption_template": parse_text},
    defaults={"caption_template": PHOTO_TEMPLATE},
    reader="winoground",
)
WINOGAVIL = Protocol(
    run=run_winogavil,
    metrics={
        "jaccard_10_12": Metric("share", "Jaccard index of 10 and 12 images"),
        "jaccard_5_6": Metric("share", "Jaccard index of 5 and 6 images"),
        "jaccard": Metric("share", "Jaccard index"),
    },
    reader="winogavil",
)
