"""Lines of text that stand under one another: which belong together, as "GIVE" over "WAY".

Pure geometry. What a text is worth is decided in `match`.
"""

from __future__ import annotations

from collections.abc import Sequence

# Ours. Two lines belong together where the lower one begins at most this number of line heights
# under the upper one, where this share of the narrower one stands under the wider, and where
# neither is more than this many times as high as the other.
_MAX_GAP = 1.0
_MIN_OVERLAP = 0.5
_MAX_RATIO = 2.0


def stack_lines(boxes: Sequence[Sequence[float]]) -> list[list[int]]:
    """Groups lines that stand under one another.

    Args:
        boxes: of the lines, in px: (left, right, top, bottom), or the four corners of a turned one
            as x, y, x, y and so on.

    Returns:
        Indices of the lines of each group of two or more, from top to bottom. A line is in one
        group at most.
    """
    sides = [_sides(box) for box in boxes]
    order = sorted(range(len(boxes)), key=lambda i: (sides[i][2] + sides[i][3], i))
    groups: list[list[int]] = []
    for i in order:
        above = [group for group in groups if _stands_under(sides[i], sides[group[-1]])]
        if above:
            max(above, key=lambda group: sides[group[-1]][3]).append(i)
        else:
            groups.append([i])
    return [group for group in groups if len(group) > 1]


def _sides(box: Sequence[float]) -> tuple[float, float, float, float]:
    """(left, right, top, bottom) of the upright rectangle around a box."""
    if len(box) == 4:
        return tuple(box)
    return min(box[::2]), max(box[::2]), min(box[1::2]), max(box[1::2])


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
