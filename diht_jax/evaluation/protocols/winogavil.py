"""WinoGAViL: which of 5 to 12 images are associated with a cue?

Bitton et al., arXiv 2207.12576, as DataComp measures it (`eval_utils/wino_eval.py`): as many of a
game's images are chosen as the cue has associations, those most similar to "A cue" or "An cue"; the
score of a game is the Jaccard index of the chosen and the associated ones. Ours, ties: an image
that is no association comes before one that is exactly as similar.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import (
    EmbeddingModel,
    EncodedImages,
    encode_images,
    encode_texts,
)
from diht_jax.evaluation.protocols.base import Measured, Metric, Protocol, Task
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

_FEW, _MANY = 6, 10  # candidates of the smaller games at most, of the larger ones at least


@dataclasses.dataclass(frozen=True)
class WinogavilResult:
    """What was found; g games of which all images can be used.

    Attributes:
        encoded: the images, those of other games as well.
        jaccard: float [g].
        candidates: int [g], images of each game.
        incomplete: games left out since one of their images cannot be used.
    """

    encoded: EncodedImages
    jaccard: np.ndarray
    candidates: np.ndarray
    incomplete: int

    @property
    def num_items(self) -> int:
        """Independent items: the games."""
        return len(self.jaccard)

    def resampled_metrics(self, counts: np.ndarray) -> dict[str, float]:
        """The metrics if game i had been there `counts[i]` times; int [g]."""
        parts = {
            "jaccard_10_12": self.candidates >= _MANY,
            "jaccard_5_6": self.candidates <= _FEW,
            "jaccard": np.ones(self.num_items, bool),
        }
        weights = {name: counts * part for name, part in parts.items() if part.any()}
        return {
            # Of few games a resample may have none; then there is no mean.
            name: float((own * self.jaccard).sum() / own.sum()) if own.any() else float("nan")
            for name, own in weights.items()
        }


def evaluate_winogavil(
    model: EmbeddingModel,
    pairs: Iterable[Pair | Skipped],
    *,
    batch_size: int = 256,
    num_threads: int | None = None,
    progress: bool = False,
) -> WinogavilResult:
    """Embeds all images and cues, and chooses the associations of each game.

    Args:
        model: see `EmbeddingModel`.
        pairs: of `winogavil.winogavil_units`, consumed once.
        batch_size: images, and texts, a batch over all devices.
        num_threads: decoding threads; None is one per core.
        progress: show a bar for the texts on stderr.

    Raises:
        ValueError: pairs of another source, no complete game.
    """

    def describe(pair: Pair) -> list[dict[str, Any]]:
        if "games" not in pair.metadata:
            raise ValueError(f"record '{pair.key}': expected a source 'winogavil:FILE'")
        return pair.metadata["games"]

    encoded = encode_images(model, pairs, describe, batch_size=batch_size, num_threads=num_threads)
    games: dict[int, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    for row, own in enumerate(encoded.notes):
        for game in own:
            games[game["game"]].append((row, game))
    complete = [own for _, own in sorted(games.items()) if len(own) == own[0][1]["candidates"]]
    if not complete:
        raise ValueError("no game of which all images can be used")
    prompts = {own[0][1]["cue"]: cue_prompt(own[0][1]["cue"]) for own in complete}
    text_emb = encode_texts(
        model.encode_text, list(prompts.values()), batch_size=batch_size, progress=progress
    )
    text_of = dict(zip(prompts, text_emb, strict=True))
    jaccard = []
    for own in complete:
        rows = [row for row, _ in own]
        is_association = np.array([game["is_association"] for _, game in own])
        similarities = encoded.image_emb[rows] @ text_of[own[0][1]["cue"]]
        jaccard.append(jaccard_index(similarities, is_association))
    return WinogavilResult(
        encoded=encoded,
        jaccard=np.array(jaccard),
        candidates=np.array([len(own) for own in complete]),
        incomplete=len(games) - len(complete),
    )


def cue_prompt(cue: str) -> str:
    """The cue in lower case behind its article, by its first letter."""
    cue = cue.lower()
    return f"{'An' if cue[:1] in 'aeiou' else 'A'} {cue}"


def jaccard_index(similarities: np.ndarray, is_association: np.ndarray) -> float:
    """Of the associated images and as many of those most similar: common ones by all of them.

    Args:
        similarities: float [k].
        is_association: bool [k], some but not all.
    """
    number = int(is_association.sum())
    chosen = np.lexsort((is_association, -similarities))[:number]
    common = int(is_association[chosen].sum())
    return common / (2 * number - common)


def _run(
    model: EmbeddingModel, task: Task, entries: Iterable[Pair | Skipped], **batching: Any
) -> Measured:
    result = evaluate_winogavil(model, entries, **batching)
    return Measured(
        encoded=result.encoded,
        num_items=result.num_items,
        measure=result.resampled_metrics,
        protocol={
            "prompt": "'A' or 'An' before the cue in lower case",
            "score": "Jaccard index of the associations and as many of the most similar images",
            "ties": "an image that is no association comes first",
        },
        counts={
            "images": len(result.encoded.positions),
            "games": result.num_items,
            "incomplete_games": result.incomplete,
        },
    )


PROTOCOL = Protocol(
    run=_run,
    metrics={
        "jaccard_10_12": Metric("share", "Jaccard index of 10 and 12 images"),
        "jaccard_5_6": Metric("share", "Jaccard index of 5 and 6 images"),
        "jaccard": Metric("share", "Jaccard index"),
    },
    reader="winogavil",
)
