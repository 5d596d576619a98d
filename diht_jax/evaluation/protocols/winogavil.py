"""WinoGAViL: which of 5 to 12 images are associated with a cue?

Bitton et al., arXiv 2207.12576, as DataComp measures it (`eval_utils/wino_eval.py`): as many of a
game's images are chosen as the cue has associations, those most similar to "A cue" or "An cue"; the
score of a game is the Jaccard index of the chosen and the associated ones. Ours, ties: an image
that is no association comes before one that is exactly as similar.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import Encoder
from diht_jax.evaluation.protocols.base import Measured, Metric, Protocol, Task

_FEW, _MANY = 6, 10  # candidates of the smaller games at most, of the larger ones at least


def run(task: Task, encoder: Encoder) -> Measured:
    """Embeds all images and cues of `annotations.winogavil_units`, and chooses for each game.

    Games of which an image cannot be used are left out. Items are the games.
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
    prompts = [cue_prompt(cue) for cue in cues]
    text_emb = encoder.texts(prompts)
    text_of = dict(zip(cues, text_emb, strict=True))
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
        # A resample of few games may have none of a part; then there is no mean.
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
    """The cue in lower case behind its article, by its first letter."""
    cue = cue.lower()
    return f"{'An' if cue[:1] in 'aeiou' else 'A'} {cue}"


def jaccard_index(similarities: np.ndarray, is_association: np.ndarray) -> float:
    """Jaccard index of the associated images and as many of those most similar.

    Args:
        similarities: float [k].
        is_association: bool [k], some but not all.
    """
    number = int(is_association.sum())
    chosen = np.lexsort((is_association, -similarities))[:number]
    common = int(is_association[chosen].sum())
    return common / (2 * number - common)


PROTOCOL = Protocol(
    run=run,
    metrics={
        "jaccard_10_12": Metric("share", "Jaccard index of 10 and 12 images"),
        "jaccard_5_6": Metric("share", "Jaccard index of 5 and 6 images"),
        "jaccard": Metric("share", "Jaccard index"),
    },
    reader="winogavil",
)
