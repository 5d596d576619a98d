"""A drawing surface in logical pixels, and what the PNG pages have in common.

The surface measures and wraps text, and draws framed pictures and boxes; the pages share their
measures, the header, the headings and the way samples are drawn.
"""

from __future__ import annotations

import bisect
import functools
import importlib.util
import io
import pathlib
import re
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diht_jax.records.escaping import escape
from diht_jax.storage.atomic_file import write_atomically

INK = (31, 35, 40)
GREY = (101, 109, 118)
LIGHT_GREY = (208, 215, 222)
PANEL = (246, 248, 250)
WHITE = (255, 255, 255)
GREEN = (26, 127, 55)
RED = (207, 34, 46)
BLUE = (9, 105, 218)

# Device pixels per logical pixel: sharp text on dense screens.
SCALE = 2

# Characters of a text; no page has room for as many, and Pillow refuses a million.
_MOST_DRAWN = 2000

WIDTH = 1120
MARGIN = 32
TILE = 112
# Below the header of a page.
CONTENT_TOP = 162

# Positions in the source -> their pictures.
ImageLoader = Callable[[Sequence[int]], dict[int, Image.Image]]


class Canvas:
    """An RGB picture; all coordinates and sizes are logical pixels from the top left corner."""

    def __init__(self, width: int, height: int):
        """A white canvas."""
        self.width, self.height = width, height
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), WHITE)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 12,
        bold: bool = False,
        color: tuple[int, int, int] = INK,
        anchor: str = "la",
    ) -> None:
        """One line of text; `anchor` as in Pillow ("la": x, y is its top left)."""
        self._draw.text(
            (x * SCALE, y * SCALE),
            _drawable(text),
            fill=color,
            font=_font(size, bold),
            anchor=anchor,
        )

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: tuple[int, int, int] | None = None,
        outline: tuple[int, int, int] | None = None,
        line: float = 1,
        radius: float = 0,
    ) -> None:
        """A rectangle with round corners; the outline lies inside."""
        corners = (x * SCALE, y * SCALE, (x + width) * SCALE - 1, (y + height) * SCALE - 1)
        self._draw.rounded_rectangle(
            corners, radius * SCALE, fill=fill, outline=outline, width=round(line * SCALE)
        )

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A thin grey line."""
        ends = (x0 * SCALE, y0 * SCALE, x1 * SCALE, y1 * SCALE)
        self._draw.line(ends, fill=LIGHT_GREY, width=SCALE)

    def picture(
        self,
        x: float,
        y: float,
        side: float,
        image: Image.Image,
        *,
        frame: tuple[int, int, int],
        line: float = 3,
    ) -> None:
        """The whole image within a framed square, its proportions kept."""
        self.box(x, y, side, side, fill=WHITE, outline=frame, line=line, radius=5)
        room = round((side - 2 * line - 4) * SCALE)
        factor = room / max(image.size)
        size = tuple(max(1, round(length * factor)) for length in image.size)
        resized = image.resize(size, Image.Resampling.LANCZOS)
        left = round((x + side / 2) * SCALE - size[0] / 2)
        top = round((y + side / 2) * SCALE - size[1] / 2)
        self.image.paste(resized, (left, top))

    def vertical_text(self, x: float, y: float, text: str, *, size: int = 12) -> None:
        """One line that reads upwards and is centred on x; it ends at y."""
        length = round(text_width(text, size=size) * SCALE) + 2
        strip = Image.new("RGB", (length, round(size * 1.3 * SCALE)), WHITE)
        ImageDraw.Draw(strip).text(
            (0, strip.height / 2), _drawable(text), fill=INK, font=_font(size, False), anchor="lm"
        )
        strip = strip.rotate(90, expand=True)
        self.image.paste(strip, (round(x * SCALE - strip.width / 2), round(y * SCALE) - length))

    def save(self, path: pathlib.Path) -> None:
        """Writes a PNG; its folder is made when missing."""
        buffer = io.BytesIO()
        # Pillow's `optimize` takes four times as long, seconds for a page, and saves 3% of it.
        self.image.save(buffer, format="PNG")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue())


def blend(color: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """White at 0, `color` at 1."""
    return tuple(round(255 + (part - 255) * share) for part in color)


def wrap(
    text: str, width: float, *, size: int = 12, bold: bool = False, max_lines: int = 3
) -> list[str]:
    """Breaks text into lines no wider than `width`; what does not fit ends in an ellipsis.

    Words too long for a line are broken inside, names of files after one of "_-/".
    """
    text = " ".join(text[:_MOST_DRAWN].split()) + "…" * (len(text) > _MOST_DRAWN)
    words = _drawable(text).split(" ") if text else []
    words = [part for word in words for part in _pieces(word, width, size=size, bold=bold)]
    lines: list[str] = []
    for word in words:
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(joined, size=size, bold=bold) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) <= max_lines:
        return lines
    last = " ".join(lines[max_lines - 1 : max_lines + 1])
    while last and text_width(f"{last}…", size=size, bold=bold) > width:
        last = last[:-1].rstrip()
    return [*lines[: max_lines - 1], f"{last}…"]


def shorten(text: str, width: float, *, size: int = 12, bold: bool = False) -> str:
    """The text in one line, with an ellipsis at its end where it does not fit."""
    return "".join(wrap(text, width, size=size, bold=bold, max_lines=1))


def text_width(text: str, *, size: int = 12, bold: bool = False) -> float:
    """Width of one line, in logical pixels."""
    return _font(size, bold).getlength(_drawable(text)) / SCALE


def _drawable(text: str) -> str:
    """The text as Pillow can lay it out: one line, no control characters, not too long."""
    return escape(text if len(text) <= _MOST_DRAWN else f"{text[:_MOST_DRAWN]}…")


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


def _pieces(word: str, width: float, *, size: int, bold: bool) -> list[str]:
    pieces = []
    while text_width(word, size=size, bold=bold) > width and len(word) > 1:
        # The longest beginning that fits; one letter, where none does.
        lengths = range(2, len(word))
        fits_not = bisect.bisect_left(
            lengths, True, key=lambda n: text_width(word[:n], size=size, bold=bold) > width
        )
        length = 1 + fits_not
        parts = re.match(".*[_/-]", word[:length])
        # A break that leaves most of the line empty would not be worth it.
        if parts and parts.end() > length // 2:
            length = parts.end()
        pieces.append(word[:length])
        word = word[length:]
    return [*pieces, word]


@functools.cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    # The DejaVu files that matplotlib ships: far more of Unicode than Pillow's own font has.
    package = importlib.util.find_spec("matplotlib")
    fonts = pathlib.Path(package.submodule_search_locations[0]) / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(
        fonts / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"), size * SCALE
    )
