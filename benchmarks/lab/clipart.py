"""Clip art with the titles that its artists gave: real and noisy captions; frozen before any run.

The drawings are those of `python -m data_prep.examples clipart`. Of 6,824, 4,099 have a title that
three or more share: names of collections, mostly. Of the others, 500 are held out, and their titles
were judged next to the pictures (`clipart_judged.tsv`); those that name their picture in English
measure the students. Every seed trains on a draw of four fifths of the drawings that are left.
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
_MOST_ALIKE = 2  # drawings of one title, where it is that of the drawing and not of a collection
_DRAWN = 0.8


def read_judgements() -> dict[str, str]:
    """ "names", "language" or "not", by the keys of the held-out drawings."""
    lines = [line for line in _JUDGED.read_text().splitlines() if not line.startswith("#")]
    return {row["key"]: row["judgement"] for row in csv.DictReader(lines, delimiter="\t")}


def digest() -> str:
    """Changes where other drawings are held out, or where titles are judged otherwise."""
    return hashlib.sha256(_JUDGED.read_bytes()).hexdigest()[:16]


def has_own_title(pairs: Sequence[Any]) -> list[bool]:
    """Whether at most two of the pairs have the title of a pair; case is not looked at."""
    titles = [pair.caption.strip().lower() for pair in pairs]
    counts = collections.Counter(titles)
    return [counts[title] <= _MOST_ALIKE for title in titles]


def choose_held_out(pairs: Sequence[Any]) -> list[str]:
    """The keys of the pairs that were judged: those of their own titles with the least digests."""
    keys = [p.key for p, own in zip(pairs, has_own_title(pairs), strict=True) if own]
    keys.sort(key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return keys[:_NUM_HELD_OUT]


def draw(pairs: Sequence[Any], seed: int) -> list[Any]:
    """The pairs of a seed, in their order."""
    order = np.random.default_rng([3, seed]).permutation(len(pairs))
    return [pairs[i] for i in sorted(order[: round(_DRAWN * len(pairs))])]
