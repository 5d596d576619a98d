"""Scores of the text spotter on the test set, and how they are printed.

No picture is read here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.text_spotting_testset import KINDS, TestPicture
from data_prep.text_spotting.spotter import caption_matches

FOREIGN_CAPTIONS = 40  # per picture


def score(pictures: Sequence[TestPicture], drops: np.ndarray) -> dict[str, Any]:
    """Share of drops by kind, and of all pictures that do not carry their caption."""
    kinds = np.array([p.kind for p in pictures])
    wrong = np.array([not p.carries_caption for p in pictures])
    shares = {kind: float(drops[kinds == kind].mean()) for kind in KINDS}
    return {**shares, "false_drops": float(drops[wrong].mean())}


def wrong_drops(pictures: Sequence[TestPicture], drops: np.ndarray) -> list[dict[str, str]]:
    """The false drops, to look at."""
    return [
        {"key": p.key, "caption": p.caption, "drawn": p.drawn}
        for p, drop in zip(pictures, drops, strict=True)
        if drop and not p.carries_caption
    ]


def best_confidence(
    read: Sequence[tuple[str, float]], caption: str, matching: tuple[int, int | None]
) -> float:
    """Of the lines that match the caption; -1 for none."""
    min_chars, misread = matching
    return max(
        (
            confidence
            for text, confidence in read
            if caption_matches([text], caption, min_chars, misread_min_chars=misread)
        ),
        default=-1.0,
    )


def match_foreign_captions(
    spots: Sequence[Sequence[tuple[str, float]]],
    pictures: Sequence[TestPicture],
    matching: tuple[int, int | None],
) -> np.ndarray:
    """Lines against captions of other pictures, which no drawn text repeats; best confidences.

    The few pictures of the test set cannot show how rare false drops are; these pairs can.
    """
    best = []
    for i, (read, picture) in enumerate(zip(spots, pictures, strict=True)):
        for k in range(1, FOREIGN_CAPTIONS + 1):
            caption = pictures[(i + 4 * k) % len(pictures)].caption
            if not caption_matches(picture.drawn.split("\n"), caption):
                best.append(best_confidence(read, caption, matching))
    return np.array(best)


def print_curves(payload: dict[str, Any]) -> None:
    """The choosing half."""
    head = [*KINDS, "false_drops"]
    print(
        f"{'canvas':>6} {'match':>8} {'conf':>5} " + " ".join(f"{n:>11}" for n in head) + " foreign"
    )
    for row in payload["curve"]:
        match = f"{row['min_chars']}/{row['misread_min_chars'] or '-'}"
        shares = " ".join(f"{100 * row[name]:10.1f}%" for name in head)
        foreign = f"{100 * row['foreign']:8.3f}%"
        print(f"{row['canvas_size']:6} {match:>8} {row['min_confidence']:5.2f} {shares} {foreign}")
    print(f"\n{'gate':>6} {'score':>6} {'bare skipped':>17} {'drops lost':>11}")
    for row in payload["gates"]:
        print(
            f"{row['gate_size']:6} {row['gate_score']:6.2f} {100 * row['bare_passed_over']:16.1f}% "
            f"{row['drops_lost']:5} of {row['drops']}"
        )


def print_report(payload: dict[str, Any]) -> None:
    """The reporting half."""
    print("\nReporting half, at the defaults:")
    for name in (*KINDS, "false_drops"):
        plain = payload["agreement"]["plain"][name]
        print(f"  {name:12} {100 * payload['report'][name]:6.1f}%   readtext {100 * plain:6.1f}%")
    print(f"  decisions as readtext's: {100 * payload['agreement']['equal']:.1f}%")
    speed = payload["speed"]
    print(
        f"Images/s of one core: ours {speed['ours_images_per_sec']:.2f}, EasyOCR's defaults "
        f"{speed['easyocr_defaults_images_per_sec']:.2f}, ratio {speed['ratio']:.1f}"
    )
    for name, rate in payload["costs"].items():
        print(f"  {name:22} {rate:6.2f} images/s")
