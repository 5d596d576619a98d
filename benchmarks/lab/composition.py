"""Wrong captions of the synthetic scenes that differ from the right one as SugarCrepe's do.

A held-out scene has two objects, and its caption names size, texture, colour and shape of both, so
that each change of these words makes it wrong. Swaps keep all words of the caption; replacements
bring in a colour or a shape that the scene does not have, which a bag of words can tell.
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
# Of these the picture does not tell the one object's side from the other's.
_SYMMETRIC = ("beside", "against")


def ask(entries: Iterable[Pair | Skipped]) -> Iterator[Pair | Skipped]:
    """The scenes with questions for `caption_choice`, whose groups are the kinds of change."""
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
    """Captions that are not true of a scene, by the kind of change; those that can be made.

    Args:
        caption: complete, as of the held-out scenes.
        scene: as `Scene.describe` gives it.
    """
    if len(scene["objects"]) != 2:
        return {}
    first, second = scene["objects"]
    right = [_describe(first), _describe(second)]
    # Each must be found once, and not within the other.
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
    """The words of an object in a complete caption; all begin with its size."""
    texture = () if item["texture"] == "plain" else (item["texture"],)
    return " ".join((item["size"], *texture, item["color"], item["shape"]))


def _exchange(caption: str, right: Sequence[str], wrong: Sequence[str]) -> str:
    """The caption with the one phrase in the position of the other, both at once."""
    marks = ("\0", "\1")
    for phrase, mark in zip(right, marks, strict=True):
        caption = caption.replace(phrase, mark)
    for phrase, mark in zip(wrong, marks, strict=True):
        caption = caption.replace(mark, phrase)
    return caption
