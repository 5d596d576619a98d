"""Readings: the text read in pictures, kept on disk, and what one look at a picture is worth.

A file of the cache belongs to one input shard and one set of OCR settings; an entry belongs to the
bytes of one picture. Thresholds of the decision are no part of it, so that they can be replayed.
The files are appended to and never rewritten: a killed run keeps what it had spotted.

Which lines to read first, and whether they match a caption, are functions of the lines that were
found. Pictures and networks must not come in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from data_prep.text_spotting.match import (
    SURE,
    can_match,
    caption_matches,
    fold_text,
    shares_misread_run,
    weigh_texts,
)
from data_prep.text_spotting.ocr import Box, box_sides, box_size
from data_prep.text_spotting.settings import Settings
from diht_jax.storage.files import add_checksum, parse_checked_object, write_bytes
from diht_jax.storage.stores import naming_output

# A line of fewer heights than this in width can hardly hold five letters.
_WORD_ASPECT = 1.5
_BETWEEN_LINES = " / "  # of a match that took several
# Ours. Two lines belong together where the lower one begins at most this number of line heights
# under the upper one, where this share of the narrower one stands under the wider, and where
# neither is more than this many times as high as the other.
_MAX_GAP = 1.0
_MIN_OVERLAP = 0.5
_MAX_RATIO = 2.0


@dataclasses.dataclass
class Lines:
    """The lines of text that one look found.

    Attributes:
        boxes: in px.
        texts: for each box, text and confidence; None for a box that was not read.
    """

    boxes: list[Box]
    texts: list[tuple[str, float] | None]


@dataclasses.dataclass
class Reading:
    """Everything read in one picture.

    Attributes:
        peaks: px of the longer side -> highest character score at that resolution.
        looks: likewise -> the lines that were found.
    """

    peaks: dict[int, float] = dataclasses.field(default_factory=dict)
    looks: dict[int, Lines] = dataclasses.field(default_factory=dict)


def hash_image(data: bytes) -> str:
    """The name of a picture in the cache: 32 hexadecimal digits of its encoded bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class SpotCache:
    """The readings of one shard.

    Two shards of one name share a file; entries are added in whole lines, so that this costs
    memory only.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], shard: str):
        """Opens the file of a shard and of settings that all readings depend on, or begins one."""
        text = json.dumps(settings, indent=1, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        directory = pathlib.Path(folder) / digest
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "settings.json").exists():  # for people
            write_bytes(directory / "settings.json", f"{text}\n".encode())
        self.path = directory / f"{shard}.jsonl"
        self._entries: dict[str, dict[str, Any]] = {}
        self._lines: list[str] = []
        data = self.path.read_bytes() if self.path.exists() else b""
        for line in data.splitlines():
            # Other lines are the end of a killed run, or damage; what they held is spotted again.
            if entry := parse_checked_object(line, needs_checksum=True):
                self._entries[entry["image"]] = entry
        if data and not data.endswith(b"\n"):
            self._lines.append("\n")

    def get(self, image: str) -> Reading:
        """A reading to be completed by the caller; an empty one for an unknown `hash_image`."""
        reading = Reading()
        if (entry := self._entries.get(image)) is not None:
            reading.peaks = {int(side): score for side, score in entry["peaks"].items()}
            for side, look in entry["looks"].items():
                boxes = [tuple(box) for box in look["boxes"]]
                texts = [None if text is None else tuple(text) for text in look["texts"]]
                reading.looks[int(side)] = Lines(boxes, texts)
        return reading

    def put(self, image: str, reading: Reading) -> None:
        """Replaces what is known of a picture, on disk after the next `flush`."""
        entry = json.loads(json.dumps({"image": image, **dataclasses.asdict(reading)}))
        if self._entries.get(image) != entry:
            self._entries[image] = entry
            text = json.dumps(add_checksum(entry), ensure_ascii=False, separators=(",", ":"))
            self._lines.append(f"{text}\n")

    def flush(self) -> None:
        """Appends what is new to the file."""
        if self._lines:
            with naming_output(self.path), open(self.path, "ab", buffering=0) as file:
                file.write("".join(self._lines).encode())
            self._lines = []


def rank_lines(look: Lines) -> list[int]:
    """Indices of all lines, tall ones that are wide enough for a word first."""

    def rank(index: int) -> tuple[bool, float, int]:
        width, height = box_size(look.boxes[index])
        return width < _WORD_ASPECT * height, -height, index

    return sorted(range(len(look.boxes)), key=rank)


def count_sure_chars(look: Lines) -> int:
    """Characters of the lines that were read with confidence."""
    return sum(len(fold_text(t[0])) for t in look.texts if t is not None and t[1] >= SURE)


def find_match(look: Lines, caption: str, settings: Settings) -> str | None:
    """The text that matches a caption: of a line, of a group of lines, or of all that it took.

    Some lines of the look may not have been read yet; what is only evidence if there is hardly
    anything else counts when all have been.
    """
    least = settings.min_confidence
    known = [i for i in rank_lines(look) if (text := look.texts[i]) and text[1] >= least]
    groups = stack_lines(look.boxes) if settings.join_lines and known else []

    def is_match(lines: Sequence[int], groups: Sequence[Sequence[int]], is_all: bool) -> bool:
        joined = _join(look, lines, groups)
        return _matches(_read(look, lines), joined, caption, settings, is_all=is_all)

    # In the order of reading, so that lines that happen to be known do not change the answer.
    for count in range(1, len(known) + 1):
        if is_match(known[:count], groups, is_all=False):
            last = known[count - 1]
            if is_match([last], [], is_all=False):
                return _list_texts(look, [last])
            joined = _join(look, known[:count], [group for group in groups if last in group])
            return joined[0] if joined else _list_texts(look, known[:count])
    if known and None not in look.texts and is_match(known, groups, is_all=True):
        return _list_texts(look, known)
    return None


def longest_match(text: str, caption: str, settings: Settings) -> int:
    """The greatest `min_chars` with which a text of `find_match` matches the caption by itself."""
    texts = [(part, 1.0) for part in text.split(_BETWEEN_LINES)]
    chars = settings.min_chars
    while chars < len(text) and can_match(caption, chars + 1):
        longer = dataclasses.replace(settings, min_chars=chars + 1)
        if not _matches(texts, (), caption, longer, is_all=False):
            break
        chars += 1
    return chars


def _matches(
    texts: Sequence[tuple[str, float]],
    joined: Sequence[str],
    caption: str,
    settings: Settings,
    *,
    is_all: bool,
) -> bool:
    s = settings
    plain = [text for text, _ in texts] + list(joined)
    if not s.weigh_words:
        return caption_matches(plain, caption, s.min_chars, misread_min_chars=s.misread_min_chars)
    if s.misread_min_chars and shares_misread_run(plain, caption, s.misread_min_chars):
        return True
    return weigh_texts(texts, joined, caption, s.min_chars, is_all=is_all)


def _read(look: Lines, lines: Sequence[int]) -> list[tuple[str, float]]:
    """Text and confidence of those of the lines that have been read."""
    found = (look.texts[i] for i in lines)
    return [text for text in found if text is not None]


def _join(look: Lines, lines: Sequence[int], groups: Sequence[Sequence[int]]) -> list[str]:
    """The texts of the groups that more than one of the lines is in."""
    together = [[i for i in group if i in lines] for group in groups]
    return [" ".join(text for text, _ in _read(look, g)) for g in together if len(g) > 1]


def _list_texts(look: Lines, lines: Sequence[int]) -> str:
    return _BETWEEN_LINES.join(text for text, _ in _read(look, lines))


def stack_lines(boxes: Sequence[Box]) -> list[list[int]]:
    """Groups lines that stand under one another, by their boxes in px.

    Returns:
        Indices of the lines of each group of two or more, from top to bottom. A line is in one
        group at most.
    """
    sides = [box_sides(box) for box in boxes]
    order = sorted(range(len(boxes)), key=lambda i: (sides[i][2] + sides[i][3], i))
    groups: list[list[int]] = []
    for i in order:
        above = [group for group in groups if _stands_under(sides[i], sides[group[-1]])]
        if above:
            max(above, key=lambda group: sides[group[-1]][3]).append(i)
        else:
            groups.append([i])
    return [group for group in groups if len(group) > 1]


def _stands_under(
    lower: tuple[float, float, float, float], upper: tuple[float, float, float, float]
) -> bool:
    heights = [max(1.0, side[3] - side[2]) for side in (lower, upper)]
    widths = [max(1.0, side[1] - side[0]) for side in (lower, upper)]
    shared = min(lower[1], upper[1]) - max(lower[0], upper[0])
    gap = lower[2] - upper[3]
    # Upright rectangles around turned lines overlap: the middles must still be apart.
    apart = (lower[2] + lower[3] - upper[2] - upper[3]) / 2
    return (
        max(heights) <= _MAX_RATIO * min(heights)
        and shared >= _MIN_OVERLAP * min(widths)
        and gap <= _MAX_GAP * min(heights)
        and apart >= 0.5 * min(heights)
    )
