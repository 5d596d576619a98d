"""What the PNG pages have in common: measures, the header, section headings, the random sample.

Called by `retrieval_page` and `classification_page`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from diht_jax.evaluation.pages.canvas import GREY, PANEL, Canvas, shorten, text_width, wrap

# Positions in the source -> their pictures.
ImageLoader = Callable[[Sequence[int]], dict[int, Image.Image]]

WIDTH = 1120
MARGIN = 32
TILE = 112
# Below the header of a page.
CONTENT_TOP = 162


def draw_sample_indices(population: int, count: int, *, seed: int = 0) -> np.ndarray:
    """Up to `count` different indices, in increasing order, the same every time."""
    chosen = np.random.default_rng(seed).permutation(population)[:count]
    return np.sort(chosen)


def draw_header(canvas: Canvas, title: str, note: str, cards: Sequence[tuple[str, str]]) -> None:
    """The title, the note under it in grey, and cards with (label, value)."""
    room = WIDTH - 2 * MARGIN
    title = shorten(title, room, size=22, bold=True)
    canvas.text(MARGIN, 24, title, size=22, bold=True)
    for number, line in enumerate(wrap(note, room, size=12, max_lines=2)):
        canvas.text(MARGIN, 56 + 16 * number, line, size=12, color=GREY)
    x = MARGIN
    for label, value in cards:
        width = max(text_width(label, size=11), text_width(value, size=17, bold=True)) + 28
        canvas.box(x, 96, width, 50, fill=PANEL, radius=6)
        canvas.text(x + 14, 103, label, size=11, color=GREY)
        canvas.text(x + 14, 119, value, size=17, bold=True)
        x += width + 10


def draw_heading(canvas: Canvas, y: float, heading: str, note: str, *, x: float = MARGIN) -> None:
    """A heading with its note in grey; 28 pixels above what it is the heading of."""
    canvas.text(x, y, heading, size=15, bold=True)
    canvas.text(x + text_width(heading, size=15, bold=True) + 10, y + 3, note, size=12, color=GREY)
