"""Cache of the text read in pictures, and the match decision for one look at a picture.

A cache file belongs to one input shard and one set of OCR settings, an entry to the bytes of one
picture. Readings do not depend on the decision's thresholds, so decisions can be replayed. Files
are only appended to, so a killed run keeps what it has read.

This module also decides which lines to read first and whether they match a caption, given the
detected lines. It uses neither pictures nor networks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from data_prep.text_spotting.match import SURE, can_match, fold_text, texts_match
from data_prep.text_spotting.ocr import Box, box_sides, box_size
from data_prep.text_spotting.settings import Settings
from diht_jax.storage.files import add_checksum, parse_checked_object, write_bytes
from diht_jax.storage.stores import naming_output

# A line narrower than this many times its height can hardly hold five letters.
_WORD_ASPECT = 1.5
_BETWEEN_LINES = " / "  # joins the lines of a match of several lines
# Ours. Two lines belong together if the gap between them is at most this many line heights, if
# at least this share of the narrower line lies under the wider one, and if neither line is more
# than this many times as high as the other.
_MAX_GAP = 1.0
_MIN_OVERLAP = 0.5
_MAX_RATIO = 2.0


@dataclasses.dataclass
class Lines:
    """Lines of text found by one look at a picture.

    Attributes:
        boxes: in px.
        texts: text and confidence for each box; None for a box that was not read.
    """

    boxes: list[Box]
    texts: list[tuple[str, float] | None]


@dataclasses.dataclass
class Reading:
    """All text read in one picture.

    Attributes:
        peaks: px of the longer side -> highest character score at that resolution.
        looks: px of the longer side -> lines found at that resolution.
    """

    peaks: dict[int, float] = dataclasses.field(default_factory=dict)
    looks: dict[int, Lines] = dataclasses.field(default_factory=dict)


def hash_image(data: bytes) -> str:
    """Returns a picture's cache key: 32 hexadecimal digits, a hash of its encoded bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


class SpotCache:
    """The cached readings of one shard.

    Shards with the same name share a file. Entries are appended as whole lines, so sharing only
    costs memory.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: dict[str, Any], shard: str):
        """Opens or creates a shard's file for the settings that all its readings depend on."""
        text = json.dumps(settings, indent=1, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        directory = pathlib.Path(folder) / digest
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "settings.json").exists():  # for people to read
            write_bytes(directory / "settings.json", f"{text}\n".encode())
        self.path = directory / f"{shard}.jsonl"
        self._entries: dict[str, dict[str, Any]] = {}
        self._lines: list[str] = []
        data = self.path.read_bytes() if self.path.exists() else b""
        for line in data.splitlines():
            # An invalid line is the end of a killed run, or damage. Its picture is read again.
            if entry := parse_checked_object(line, needs_checksum=True):
                self._entries[entry["image"]] = entry
        if data and not data.endswith(b"\n"):
            self._lines.append("\n")

    def get(self, image: str) -> Reading:
        """Returns a reading for the caller to complete; it is empty if `image` is unknown."""
        reading = Reading()
        if (entry := self._entries.get(image)) is not None:
            reading.peaks = {int(side): score for side, score in entry["peaks"].items()}
            for side, look in entry["looks"].items():
                boxes = [tuple(box) for box in look["boxes"]]
                texts = [None if text is None else tuple(text) for text in look["texts"]]
                reading.looks[int(side)] = Lines(boxes, texts)
        return reading

    def put(self, image: str, reading: Reading) -> None:
        """Replaces a picture's reading. The next `flush` writes it to disk."""
        entry = json.loads(json.dumps({"image": image, **dataclasses.asdict(reading)}))
        if self._entries.get(image) != entry:
            self._entries[image] = entry
            text = json.dumps(add_checksum(entry), ensure_ascii=False, separators=(",", ":"))
            self._lines.append(f"{text}\n")

    def flush(self) -> None:
        """Appends new readings to the file."""
        if self._lines:
            with naming_output(self.path), open(self.path, "ab", buffering=0) as file:
                file.write("".join(self._lines).encode())
            self._lines = []


def rank_lines(look: Lines) -> list[int]:
    """Returns the indices of all lines: first those wide enough for a word, tall before small."""

    def rank(index: int) -> tuple[bool, float, int]:
        width, height = box_size(look.boxes[index])
        return width < _WORD_ASPECT * height, -height, index

    return sorted(range(len(look.boxes)), key=rank)


def count_sure_chars(look: Lines) -> int:
    """Counts the characters of lines that were read with confidence."""
    return sum(len(fold_text(t[0])) for t in look.texts if t is not None and t[1] >= SURE)


def find_match(look: Lines, caption: str, settings: Settings) -> str | None:
    """Returns the text that matches a caption: one line, a group of lines, or all lines needed.

    Some lines may be unread. Evidence that depends on what else the picture shows counts only once
    all lines have been read.
    """
    least = settings.min_confidence
    known = [i for i in rank_lines(look) if (text := look.texts[i]) and text[1] >= least]
    groups = stack_lines(look.boxes) if settings.join_lines and known else []

    def is_match(lines: Sequence[int], groups: Sequence[Sequence[int]], is_all: bool) -> bool:
        joined = _join(look, lines, groups)
        texts, limits = _read(look, lines), (settings.misread_min_chars, settings.weigh_words)
        return texts_match(texts, joined, caption, settings.min_chars, *limits, is_all=is_all)

    # In reading order: which lines happen to be cached must not change the answer.
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
    """Returns the largest `min_chars` for which a text from `find_match` still matches alone."""
    texts = [(part, 1.0) for part in text.split(_BETWEEN_LINES)]
    chars, limits = settings.min_chars, (settings.misread_min_chars, settings.weigh_words)
    while chars < len(text) and can_match(caption, chars + 1):
        if not texts_match(texts, (), caption, chars + 1, *limits, is_all=False):
            break
        chars += 1
    return chars


def _read(look: Lines, lines: Sequence[int]) -> list[tuple[str, float]]:
    """Returns text and confidence of those `lines` that have been read."""
    found = (look.texts[i] for i in lines)
    return [text for text in found if text is not None]


def _join(look: Lines, lines: Sequence[int], groups: Sequence[Sequence[int]]) -> list[str]:
    """Returns the texts of the groups that contain more than one of `lines`."""
    together = [[i for i in group if i in lines] for group in groups]
    return [" ".join(text for text, _ in _read(look, g)) for g in together if len(g) > 1]


def _list_texts(look: Lines, lines: Sequence[int]) -> str:
    return _BETWEEN_LINES.join(text for text, _ in _read(look, lines))


def stack_lines(boxes: Sequence[Box]) -> list[list[int]]:
    """Groups lines that stand below one another.

    Returns:
        Indices of the lines of each group of two or more, from top to bottom. A line belongs to at
        most one group.
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
    # Rectangles around rotated lines may overlap, so the centres must be apart too.
    apart = (lower[2] + lower[3] - upper[2] - upper[3]) / 2
    return (
        max(heights) <= _MAX_RATIO * min(heights)
        and shared >= _MIN_OVERLAP * min(widths)
        and gap <= _MAX_GAP * min(heights)
        and apart >= 0.5 * min(heights)
    )
