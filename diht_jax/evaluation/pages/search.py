"""The PNG page of a search: every query with the pictures found for it.

Drawing only: the matches come in with the result.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from PIL import Image

from diht_jax.evaluation.embedding.search import Match
from diht_jax.evaluation.pages.canvas import (
    BLUE,
    GREY,
    LIGHT_GREY,
    MARGIN,
    TILE,
    WIDTH,
    Canvas,
    draw_heading,
    shorten,
    wrap,
)

_PITCH = 132
_A_ROW = 8
_ROW_HEIGHT = TILE + 52
_HEADING_HEIGHT = 34
_GAP = 14
_TOP = 92


def draw_search_page(
    matches_of: Mapping[str, Sequence[Match]],
    pictures: Mapping[int, Image.Image],
    path: str | pathlib.Path,
    *,
    title: str,
    note: str,
) -> None:
    """Writes a page with the matches of every query, the best first.

    Args:
        matches_of: query -> its matches, the best first.
        pictures: by position, all that are matches.
        path: of the PNG; its folder is made when missing.
        title, note: the first two lines.
    """
    rows = [-(-len(matches) // _A_ROW) for matches in matches_of.values()]
    sections = sum(_HEADING_HEIGHT + count * _ROW_HEIGHT + _GAP for count in rows)
    height = _TOP + sections + MARGIN // 2
    canvas = Canvas(WIDTH, height)
    room = WIDTH - 2 * MARGIN
    canvas.text(MARGIN, 24, shorten(title, room, size=22, bold=True), size=22, bold=True)
    canvas.text(MARGIN, 56, shorten(note, room, size=12), size=12, color=GREY)
    top = _TOP
    for (query, matches), count in zip(matches_of.items(), rows, strict=True):
        heading = shorten(query, room - 120, size=15, bold=True)
        draw_heading(canvas, top, heading, f"the first {len(matches)}")
        top += _HEADING_HEIGHT
        for rank, match in enumerate(matches):
            x = MARGIN + (rank % _A_ROW) * _PITCH
            y = top + (rank // _A_ROW) * _ROW_HEIGHT
            _draw_match(canvas, x, y, rank, match, pictures[match.position])
        top += count * _ROW_HEIGHT + _GAP
    canvas.save(pathlib.Path(path))


def _draw_match(
    canvas: Canvas, x: float, y: float, rank: int, match: Match, image: Image.Image
) -> None:
    canvas.picture(x, y, TILE, image, frame=LIGHT_GREY, line=1)
    label = f"{rank + 1}   {match.similarity:.3f}"
    canvas.text(x + 2, y + TILE + 4, label, size=10, bold=True, color=BLUE)
    for number, line in enumerate(wrap(match.caption or match.key, TILE + 8, size=9, max_lines=2)):
        canvas.text(x + 2, y + TILE + 18 + 12 * number, line, size=9, color=GREY)
