"""Wrong captions for the synthetic scenes, made by swaps and replacements like SugarCrepe's.

A held-out scene has two objects. Its caption names the size, texture, colour and shape of both, and
changing any of these words makes it wrong. Swaps keep all words of the caption. Replacements insert
a colour or a shape that the scene does not have, which a bag of words can detect.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from data_prep.synthetic.scenes import COLORS
from data_prep.synthetic.shapes import SHAPES
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

SWAPS = ("swap_color", "swap_shape", "swap_objects")
REPLACEMENTS = ("replace_color", "replace_shape")
# Symmetric relations: exchanging the two objects leaves the caption true.
_SYMMETRIC = ("beside", "against")


def ask(entries: Iterable[Pair | Skipped]) -> Iterator[Pair | Skipped]:
    """Replaces the metadata of scenes by `caption_choice` questions, grouped by kind of change."""
    for entry in entries:
        if isinstance(entry, Pair):
            wrong = wrong_captions(entry.caption, entry.metadata["scene"])
            questions = [
                {"captions": [entry.caption, caption], "group": kind}
                for kind, caption in wrong.items()
            ]
            entry = dataclasses.replace(entry, metadata={"questions": questions})
        yield entry


def wrong_captions(caption: str, scene: Mapping[str, Any]) -> dict[str, str]:
    """Returns the wrong captions that can be made for a scene, by the kind of change.

    Args:
        caption: a complete caption, like those of the held-out scenes.
        scene: the output of `Scene.describe`.
    """
    if len(scene["objects"]) != 2:
        return {}
    first, second = scene["objects"]
    right = [_describe(first), _describe(second)]
    # Each phrase must occur exactly once, and not within the other phrase.
    if any(caption.count(phrase) != 1 for phrase in right) or right[0] in right[1]:
        return {}
    changed: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
        f"swap_{field}": (first | {field: second[field]}, second | {field: first[field]})
        for field in ("color", "shape")
    }
    changed["swap_objects"] = (second, first)
    for field, known in (("color", tuple(COLORS)), ("shape", tuple(SHAPES))):
        others = [value for value in known if value not in (first[field], second[field])]
        number = zlib.crc32(f"{field} {caption}".encode())
        changed[f"replace_{field}"] = (first | {field: others[number % len(others)]}, second)
    is_symmetric = scene["relation"] in _SYMMETRIC
    captions = {}
    for kind, objects in changed.items():
        wrong = [_describe(item) for item in objects]
        is_true = wrong == right or (is_symmetric and sorted(wrong) == sorted(right))
        if not is_true:
            captions[kind] = _exchange(caption, right, wrong)
    return captions


def _describe(item: Mapping[str, Any]) -> str:
    """Returns the words for an object in a complete caption, beginning with its size."""
    texture = () if item["texture"] == "plain" else (item["texture"],)
    return " ".join((item["size"], *texture, item["color"], item["shape"]))


def _exchange(caption: str, right: Sequence[str], wrong: Sequence[str]) -> str:
    """Replaces each right phrase by the corresponding wrong one, all at the same time."""
    marks = ("\0", "\1")
    for phrase, mark in zip(right, marks, strict=True):
        caption = caption.replace(phrase, mark)
    for phrase, mark in zip(wrong, marks, strict=True):
        caption = caption.replace(mark, phrase)
    return caption
