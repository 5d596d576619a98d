"""Emoji concepts that no training pair shows or names, in the drawings of three artists.

A concept is a caption of emoji-datasource, without skin tones. Flags are left out, because no word
of a training caption names a country. Students train on Noto's drawings. Their learning rates are
chosen on OpenMoji's, and Twemoji's are the test set: concepts held out from training, known words.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from diht_jax.records.schema import Pair

NUM_HELD_OUT = 200  # concepts for validation, and the same number for the test
_LEAST_USES = 2  # minimum number of captions with each word of a held-out concept
_WORD = re.compile(r"[a-z']+")


class Split(NamedTuple):
    """The captions of a seed's concepts; no caption is in two of the fields."""

    train: list[str]
    validation: list[str]
    test: list[str]


def choose_concepts(pairs: Iterable[Pair]) -> dict[str, str]:
    """Returns the captions of one artist's concepts; the keys are those of `code_points`."""
    return {
        code_points(pair.key): pair.caption
        for pair in pairs
        if "skin tone" not in pair.caption and pair.metadata["category"] != "Flags"
    }


def code_points(key: str) -> str:
    """Removes the variation selectors from an emoji's key, since only some artists use them."""
    return "-".join(part for part in key.lower().split("-") if part != "fe0f")


def split(captions: Sequence[str], seed: int) -> Split:
    """Splits concepts; all words of held-out concepts also occur in the training captions."""
    captions = sorted(set(captions))
    counts = collections.Counter(word for text in captions for word in _words(text))
    known = [t for t in captions if min(map(counts.get, _words(t)), default=0) >= _LEAST_USES]
    order = np.random.default_rng([4, seed]).permutation(len(known))
    drawn = [known[i] for i in order[: 2 * NUM_HELD_OUT]]
    train = [text for text in captions if text not in set(drawn)]
    words = {word for text in train for word in _words(text)}
    halves = drawn[:NUM_HELD_OUT], drawn[NUM_HELD_OUT:]
    validation, test = ([t for t in half if _words(t) <= words] for half in halves)
    return Split(train, validation, test)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text))
