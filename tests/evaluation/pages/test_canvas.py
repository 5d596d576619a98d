"""Text on the pages stays within its room."""

import pytest
from PIL import Image

from diht_jax.evaluation.pages.canvas import GREEN, SCALE, Canvas, text_width, wrap

TEXT = "a photo of two small dogs on a sofa, Donaudampfschifffahrtsgesellschaftskapitänsmütze"


@pytest.mark.parametrize("width", [40, 90, 200, 2000])
@pytest.mark.parametrize("max_lines", [1, 2, 20])
def test_wrapped_lines_fit(width, max_lines):
    lines = wrap(TEXT, width, size=11, max_lines=max_lines)
    assert 1 <= len(lines) <= max_lines
    assert all(text_width(line, size=11) <= width for line in lines)
    shown = "".join(lines).replace(" ", "")
    if lines[-1].endswith("…"):
        assert TEXT.replace(" ", "").startswith(shown[:-1])
    else:
        assert shown == TEXT.replace(" ", "")


def test_names_of_files_are_broken_between_their_words():
    name = "n03376595_folding_chair.jpg"
    width = text_width("n03376595_folding_chai", size=9)
    assert wrap(name, width, size=9) == ["n03376595_folding_", "chair.jpg"]


def test_an_ellipsis_only_where_something_is_left_out():
    assert wrap(TEXT, 2000, max_lines=1) == [TEXT]
    assert wrap(TEXT, 90, max_lines=1)[0].endswith("…")
    assert wrap("", 90) == []


@pytest.mark.parametrize("size", [(400, 10), (10, 400), (3, 3), (1, 500)])
def test_a_picture_stays_within_its_frame(size):
    canvas = Canvas(60, 60)
    canvas.picture(10, 10, 40, Image.new("RGB", size, "blue"), frame=GREEN, line=3)
    pixels = canvas.image.load()
    blue = [
        (x, y) for x in range(60 * SCALE) for y in range(60 * SCALE) if pixels[x, y] == (0, 0, 255)
    ]
    inside = range(13 * SCALE, 47 * SCALE)
    assert blue
    assert all(x in inside and y in inside for x, y in blue)
    assert pixels[11 * SCALE, 30 * SCALE] == GREEN


@pytest.mark.parametrize(
    "text",
    ["a\0b\x1b[31m", "lone \ud800", "x" * 3 * 10**6, "a b " * 10**6, "e" + "\u0301" * 10**5]
    + ["\u202e gpj", "line\nline\u2028line", "\x85\x9b" * 50, "\u200d" * 3000, "ﷺ" * 1000],
)
def test_hostile_texts_are_laid_out(text):
    lines = wrap(text, 100, size=9, max_lines=2)
    assert 1 <= len(lines) <= 2
    assert all(text_width(line, size=9) <= 100 for line in lines)
    canvas = Canvas(120, 60)
    canvas.text(2, 2, text)
    canvas.vertical_text(60, 58, text[:50])
    for line in lines:
        canvas.text(2, 20, line, size=9)
