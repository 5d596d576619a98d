"""What one look at a picture is worth: which lines to read first, and whether they match a caption.

Pure functions of the lines that were found. Pictures and networks must not come in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from data_prep.text_spotting.cache import Lines
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

# A line of fewer heights than this in width can hardly hold five letters.
_WORD_ASPECT = 1.5
_BETWEEN_LINES = " / "  # of a match that took several
# Ours. Two lines belong together where the lower one begins at most this number of line heights
# under the upper one, where this share of the narrower one stands under the wider, and where
# neither is more than this many times as high as the other.
_MAX_GAP = 1.0
_MIN_OVERLAP = 0.5
_MAX_RATIO = 2.0


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
