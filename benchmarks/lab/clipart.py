"""Clip art with its artists' titles as real, noisy captions; frozen before any run.

The drawings come from `python -m data_prep.examples clipart`. Of the 6,824 drawings, 4,099 have a
title that three or more drawings share, mostly the name of a collection. 500 of the others are held
out. Their titles were judged next to the pictures (`clipart_judged.tsv`), and those that name their
picture in English form the test set. Each seed trains on four fifths of the remaining drawings.
"""

from __future__ import annotations

import collections
import csv
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

_JUDGED = pathlib.Path(__file__).with_name("clipart_judged.tsv")
_NUM_HELD_OUT = 500
_MOST_ALIKE = 2  # a title shared by more drawings is taken for the name of a collection
_DRAWN = 0.8


def read_judgements() -> dict[str, str]:
    """Returns the judgement of each held-out drawing by its key: "names", "language" or "not"."""
    lines = [line for line in _JUDGED.read_text().splitlines() if not line.startswith("#")]
    return {row["key"]: row["judgement"] for row in csv.DictReader(lines, delimiter="\t")}


def digest() -> str:
    """Returns a hash of the held-out drawings and the judgements of their titles."""
    return hashlib.sha256(_JUDGED.read_bytes()).hexdigest()[:16]


def has_own_title(pairs: Sequence[Any]) -> list[bool]:
    """Returns for each pair whether at most two pairs share its title, ignoring case."""
    titles = [pair.caption.strip().lower() for pair in pairs]
    counts = collections.Counter(titles)
    return [counts[title] <= _MOST_ALIKE for title in titles]


def choose_held_out(pairs: Sequence[Any]) -> list[str]:
    """Returns the held-out keys: the 500 with the smallest digests among pairs with own titles."""
    keys = [p.key for p, own in zip(pairs, has_own_title(pairs), strict=True) if own]
    keys.sort(key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return keys[:_NUM_HELD_OUT]


def draw(pairs: Sequence[Any], seed: int) -> list[Any]:
    """Draws four fifths of the pairs for a seed; keeps their order."""
    order = np.random.default_rng([3, seed]).permutation(len(pairs))
    return [pairs[i] for i in sorted(order[: round(_DRAWN * len(pairs))])]
