"""Scores of the readers of `benchmarks.text_spotting`, and their report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.text_spotting_testset import KINDS, TestPicture

FOREIGN_CAPTIONS = 40  # per picture


def foreign_captions(pictures: Sequence[TestPicture], index: int) -> list[str]:
    """Returns captions of other images whose text does not occur in an image; [] without text."""
    picture = pictures[index]
    first_line = picture.drawn.split("\n")[0]
    if not picture.drawn:
        return []
    others = (
        pictures[(index + 4 * k + 1) % len(pictures)].caption for k in range(FOREIGN_CAPTIONS)
    )
    return [
        caption
        for caption in others
        if caption != picture.caption and not caption.startswith(first_line)
    ]


def score(pictures: Sequence[TestPicture], drops: Sequence[Sequence[bool]]) -> dict[str, Any]:
    """Computes recall and false drops of one reader.

    Args:
        pictures: images of the test set.
        drops: for each image, whether its caption was found, and whether each of
            `foreign_captions` was found.
    """
    kinds = np.array([p.kind for p in pictures])
    carries = np.array([p.carries_caption for p in pictures])
    dropped = np.array([found[0] for found in drops])
    foreign = np.concatenate([found[1:] for found in drops])
    return {
        **{kind: _count(dropped[kinds == kind]) for kind in KINDS},
        "found": _count(dropped[carries]),
        "recall": float(dropped[carries].mean()),
        "dropped_wrongly": _count(dropped[kinds == "unrelated"]),
        "foreign_pairs": len(foreign),
        "foreign_share": float(foreign.mean()),
        "missed": [
            p.key for p, drop in zip(pictures, dropped, strict=True) if p.carries_caption > drop
        ],
        "wrong": [
            {"key": p.key, "caption": p.caption, "drawn": p.drawn}
            for p, drop in zip(pictures, dropped, strict=True)
            if p.carries_caption < drop
        ],
    }


def _count(found: np.ndarray) -> list[int]:
    """Returns [dropped, total]."""
    return [int(found.sum()), len(found)]


def print_report(payload: dict[str, Any]) -> None:
    """Prints a line for each reader, and their speed."""
    names = (*KINDS, "found", "dropped_wrongly")
    print(" " * 10 + " ".join(f"{name:>15}" for name in names) + "  foreign")
    for reader, scores in payload["scores"].items():
        counts = " ".join(f"{'{} of {}'.format(*scores[name]):>15}" for name in names)
        print(f"{reader:10}{counts} {100 * scores['foreign_share']:7.2f}%")
    speed = payload["speed"]
    for reader, rate in speed["images_per_sec"].items():
        ratio = speed["times_easyocr"][reader]
        print(f"{reader:10} {rate:6.2f} images/s of one core, {ratio:.1f} times EasyOCR's")
