"""Draws the pictures of the synthetic web: scenes of shapes, and captions as rendered text.

The content of scenes and captions is chosen elsewhere. Fonts come from matplotlib and Pillow, so
nothing is downloaded.
"""

import functools
import pathlib
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.synthetic.scenes import COLORS, Scene, SceneObject

_OVERSAMPLING = 4
_LINE_COLOR = (70, 72, 84)
_LINE_WIDTH = 0.02  # Lengths here and below are fractions of the image side.
_EDGE_WIDTH = 0.011
_FONT_FILES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono.ttf",
    "pillow",
)
_TEXT_SIZES = (0.14, 0.125, 0.11, 0.1, 0.09, 0.08)
_TEXT_MARGIN = 0.05

Rgb = tuple[int, int, int]


def render_scene(rng: np.random.Generator, scene: Scene, side: int) -> Image.Image:
    """Draws a scene as an RGB picture of `side` x `side` pixels.

    The generator sets the light background tint, shading, grain and small shifts of the colours. It
    changes nothing that a caption describes.
    """
    red, green, blue = rng.integers(214, 250, size=3).tolist()
    wall = red, green, blue
    big = side * _OVERSAMPLING
    canvas = Image.new("RGB", (big, big), wall)
    draw = ImageDraw.Draw(canvas)
    if scene.ground is not None:
        draw.rectangle((0, scene.ground * big, big, big), fill=_mix(wall, (96, 88, 80), 0.25))
    for line in scene.lines:
        points = [value * big for value in line]
        draw.line(points, fill=_LINE_COLOR, width=round(_LINE_WIDTH * big))
    # The occluding object is drawn last: objects[1] for "behind", objects[0] otherwise.
    order = scene.objects if scene.relation == "behind" else scene.objects[::-1]
    for item in order:
        _paint_object(rng, canvas, item)
    return _add_light(rng, canvas.reduce(_OVERSAMPLING))


def _mix(color: Rgb, other: Rgb, share: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(color, other, strict=True))
    return red, green, blue


def _paint_object(rng: np.random.Generator, canvas: Image.Image, item: SceneObject) -> None:
    big = canvas.width
    shift = rng.integers(-6, 7, size=3)
    base = tuple(np.clip(np.add(COLORS[item.color], shift), 0, 255).tolist())
    hole = item.hole()
    outlines = [item.outline() * big] + ([] if hole is None else [hole * big])
    left, top = np.floor(outlines[0].min(axis=0)).astype(int) - 1
    right, bottom = np.ceil(outlines[0].max(axis=0)).astype(int) + 2
    mask = Image.new("L", (int(right - left), int(bottom - top)))
    for outline, fill in zip(outlines, (255, 0), strict=False):
        ImageDraw.Draw(mask).polygon((outline - [left, top]).ravel().tolist(), fill=fill)
    patch = _texture(rng, item, base, mask.size, big)
    canvas.paste(patch, (int(left), int(top)), mask)
    draw = ImageDraw.Draw(canvas)
    for outline in outlines:
        closed = np.concatenate([outline, outline[:2]]).ravel().tolist()
        edge = _mix(base, (0, 0, 0), 0.35)
        draw.line(closed, fill=edge, width=round(_EDGE_WIDTH * big), joint="curve")


def _texture(
    rng: np.random.Generator, item: SceneObject, base: Rgb, size: tuple[int, int], big: int
) -> Image.Image:
    """Returns a patch in the object's colour, with its texture in a pale version of that colour."""
    if item.texture == "plain":
        return Image.new("RGB", size, base)
    width, height = size
    # Coordinates in periods, which on small objects are still visible at 64 pixels.
    period = (0.05 + 0.27 * item.radius) * big
    x = ((np.arange(width, dtype=np.float32) - width / 2) / period)[None, :]
    y = ((np.arange(height, dtype=np.float32) - height / 2) / period)[:, None]
    if item.texture == "striped":
        across, along = ((1, 0), (0, 1), (0.7, 0.7), (0.7, -0.7))[rng.integers(4)]
        pale = (across * x + along * y + rng.random()) % 1.0 < 0.45
    elif item.texture == "dotted":
        pale = (x % 1.0 - 0.5) ** 2 + (y % 1.0 - 0.5) ** 2 < 0.3**2
    else:
        pale = np.floor(x * 1.6) % 2 == np.floor(y * 1.6) % 2
    patch = Image.new("RGB", size, base)
    pattern = Image.fromarray(np.broadcast_to(pale, (height, width)).astype(np.uint8) * 255)
    patch.paste(_mix(base, (255, 255, 255), 0.82), (0, 0), pattern)
    return patch


def _add_light(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Adds a linear shading and some grain."""
    side = picture.width
    slope = rng.uniform(-9, 9, size=2)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    shading = slope[0] * ramp[:, None] + slope[1] * ramp[None, :]
    grain = rng.standard_normal((side, side, 3), dtype=np.float32) * np.float32(rng.uniform(0, 6))
    pixels = np.asarray(picture, dtype=np.float32) + shading[..., None].astype(np.float32) + grain
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def render_text(rng: np.random.Generator, text: str, side: int) -> Image.Image:
    """Returns a picture of wrapped `text`, in a random font, size and pair of colours.

    The whole text is visible, in letters of at least 8% of the image side.

    Raises:
        ValueError: the text does not fit even in the smallest size.
    """
    dark = tuple(int(v) for v in rng.integers(0, 90, size=3))
    light = tuple(int(v) for v in rng.integers(205, 256, size=3))
    ink, paper = (dark, light) if rng.random() < 0.7 else (light, dark)
    name = _FONT_FILES[rng.integers(len(_FONT_FILES))]
    picture = Image.new("RGB", (side, side), paper)
    draw = ImageDraw.Draw(picture)
    room = side * (1 - 2 * _TEXT_MARGIN)
    layouts = []
    for size in _TEXT_SIZES:
        font = _font(name, round(size * side))
        # A text box may be a few pixels wider than the advance of its letters.
        wrapped = _wrap(text, font, 0.96 * room)
        left, top, right, bottom = draw.multiline_textbbox((0, 0), wrapped, font=font, spacing=2)
        if right - left <= room and bottom - top <= room:
            layouts.append((font, wrapped, (left, top, right, bottom)))
    if not layouts:
        raise ValueError(f"the text does not fit on {side} x {side} pixels: {text!r}")
    font, wrapped, (left, top, right, bottom) = layouts[rng.integers(min(2, len(layouts)))]
    free_x, free_y = side - (right - left), side - (bottom - top)
    corner = (free_x / 2 - left, round(free_y * rng.uniform(0.3, 0.7)) - top)
    align = ("left", "center")[rng.integers(2)]
    draw.multiline_text(corner, wrapped, fill=ink, font=font, spacing=2, align=align)
    return picture


@functools.cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout engine, since raqm is not installed everywhere and would change pictures.
    basic = ImageFont.Layout.BASIC
    if name == "pillow":
        font: Any = ImageFont.load_default(size)  # a FreeType font if a size is given
        return font.font_variant(layout_engine=basic)
    import matplotlib

    path = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=basic)


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
