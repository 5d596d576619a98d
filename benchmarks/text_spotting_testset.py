"""Images with known text, to calibrate and test the text spotter.

Captions are drawn on photos if given, else on the scenes of `data_prep.synthetic`. This module does
not know the spotter.

All choices in this file are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
import tarfile
from collections.abc import Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_prep.synthetic.captions import describe_scene
from data_prep.synthetic.drawing import render_scene
from data_prep.synthetic.sampling import sample_scene
from data_prep.text_spotting.match import caption_matches
from diht_jax.input.transforms import decode_rgb

# Kind -> its share. The first four show the caption and should be dropped, the others should not.
KINDS = {
    "band": 0.2,  # the caption on a plain band, letters of 20 px or more
    "picture": 0.2,  # directly on the image, no outline, 20 px or more
    "small": 0.1,  # either of the two, 12 to 17 px
    "rotated": 0.1,  # either of the two, 20 px or more, rotated by 3 to 10 degrees
    "unrelated": 0.2,  # words of another caption
    "nothing": 0.2,  # the image without text
}
CARRIES_CAPTION = frozenset({"band", "picture", "small", "rotated"})

_FONTS = (
    *("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSans-Oblique.ttf", "DejaVuSerif.ttf"),
    *("DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf", "STIXGeneral.ttf", "STIXGeneralBol.ttf"),
    "STIXGeneralItalic.ttf",
)
# Font size (the em) in px; capitals are about 0.7 of it high, an "x" half of it.
_LARGE = (20, 33)
_SMALL = (12, 18)
_MAX_LINES = 3
_MARGIN = 8  # px
_INKS = ((255, 255, 255), (0, 0, 0), (255, 225, 0), (200, 20, 30), (20, 60, 170))
_PAPERS = ((255, 255, 255), (0, 0, 0), (240, 235, 220), (30, 40, 90), (255, 220, 60))
_MIN_CONTRAST = 70.0  # grey levels between ink and background; readable for humans
_SYNTHETIC_SIDE = 352  # px
_JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class TestPicture:
    """One image with a caption.

    Attributes:
        key: its name; equal for equal arguments of `make_test_set`.
        image: JPEG bytes.
        caption: caption of the pair.
        kind: a key of `KINDS`.
        drawn: the text in the image, lines separated by a newline; "" for none.
        font_px: font size; 0 for none.
        group: number of the background image; halves must not share one.
    """

    __test__ = False  # not a test case of pytest

    key: str
    image: bytes
    caption: str
    kind: str
    drawn: str
    font_px: int
    group: int

    @property
    def carries_caption(self) -> bool:
        """Whether the pair should be dropped."""
        return self.kind in CARRIES_CAPTION


def make_test_set(
    count: int,
    *,
    seed: int = 0,
    photos: str | pathlib.Path | None = None,
    captions: str | pathlib.Path | Sequence[str] | None = None,
    fonts: Sequence[str | pathlib.Path] = _FONTS,
    share_words: bool = False,
) -> list[TestPicture]:
    """Draws the test set; equal arguments give equal images.

    Args:
        count: number of images, with the kinds in the shares of `KINDS`.
        seed: seed of all random choices.
        photos: a tar of JPEG files to draw on; None for synthetic scenes.
        captions: a text file with one caption per line, or its lines; None for synthetic captions.
        fonts: files, or names of fonts that matplotlib ships.
        share_words: whether the unrelated text may share words with the caption, as any two
            captions may; else it shares no run of five characters.

    Raises:
        ValueError: there are no images in `photos`, or too few captions.
    """
    backgrounds = _read_photos(photos) if photos is not None else None
    lines = _read_captions(captions) if captions is not None else None
    style = _Style(tuple(map(str, fonts)), lines, share_words)
    kinds = np.repeat(list(KINDS), [round(count * share) for share in KINDS.values()])[:count]
    kinds = np.concatenate([kinds, ["nothing"] * (count - len(kinds))])
    pictures = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        # Neighbours in `kinds` get different photos, and every kind gets photos of both halves.
        group = index % len(backgrounds) if backgrounds else index
        ground = backgrounds[group].copy() if backgrounds else _synthetic(rng)
        pictures.append(_make_picture(rng, str(kinds[index]), ground, style, index, group))
    return pictures


def split_halves(
    pictures: Sequence[TestPicture],
) -> tuple[list[TestPicture], list[TestPicture]]:
    """Splits into one half to choose settings, and one to report results; they share no photo."""
    choosing = [picture for picture in pictures if picture.group % 2 == 0]
    return choosing, [picture for picture in pictures if picture.group % 2 == 1]


@dataclasses.dataclass(frozen=True)
class _Style:
    """Texts and fonts to draw; fields as the arguments of `make_test_set`."""

    fonts: tuple[str, ...]
    captions: list[str] | None
    share_words: bool


def _make_picture(
    rng: np.random.Generator,
    kind: str,
    ground: Image.Image,
    style: _Style,
    index: int,
    group: int,
) -> TestPicture:
    caption, other = _choose_captions(rng, style)
    drawn, font_px = "", 0
    if kind != "nothing":
        on_band = kind == "band" or (kind != "picture" and rng.random() < 0.5)
        angle = float(rng.uniform(3, 10) * rng.choice([-1, 1])) if kind == "rotated" else 0.0
        sizes = range(*(_SMALL if kind == "small" else _LARGE))
        # A rotated block must not lose its ends.
        room = round(0.85 * ground.width) if angle else ground.width - 2 * _MARGIN
        while not (
            layouts := _lay_out(
                rng, style.fonts, other if kind == "unrelated" else caption, sizes, room
            )
        ):
            caption, other = _choose_captions(rng, style)  # with shorter words
        drawn, font_px = _draw_text(rng, ground, layouts, on_band, angle)
    buffer = io.BytesIO()
    ground.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    key = f"{index:04d}-{kind}"
    return TestPicture(key, buffer.getvalue(), caption, kind, drawn, font_px, group)


def _choose_captions(rng: np.random.Generator, style: _Style) -> tuple[str, str]:
    """Returns a caption and another one."""
    while True:
        if style.captions is None:
            caption, other = (describe_scene(rng, sample_scene(rng)) for _ in range(2))
        else:
            chosen = rng.choice(len(style.captions), 2, replace=False)
            caption, other = (style.captions[i] for i in chosen)
        if style.share_words or not caption_matches([other], caption):
            return caption, other


def _lay_out(
    rng: np.random.Generator, fonts: Sequence[str], text: str, sizes: range, room: int
) -> list[tuple[int, ImageFont.FreeTypeFont, str]]:
    """Returns size, font and wrapped first words, for every size in which it is evidence."""
    layouts = []
    for size in sizes:
        font = _load_font(fonts[rng.integers(len(fonts))], size)
        drawn = _wrap(text, font, room)
        if any(len(line.replace(" ", "")) >= 5 for line in drawn.split("\n")):
            layouts.append((size, font, drawn))
    return layouts


def _draw_text(
    rng: np.random.Generator,
    ground: Image.Image,
    layouts: list[tuple[int, ImageFont.FreeTypeFont, str]],
    on_band: bool,
    angle: float,
) -> tuple[str, int]:
    """Draws one of the layouts; returns the text and the size."""
    size, font, drawn = layouts[rng.integers(len(layouts))]
    left, top, right, bottom = ImageDraw.Draw(ground).multiline_textbbox((0, 0), drawn, font=font)
    width, height = int(right - left) + 1, int(bottom - top) + 1
    paper = _PAPERS[rng.integers(len(_PAPERS))]
    if on_band and not angle:
        band_height = height + 2 * _MARGIN
        y = int(rng.integers(0, max(1, ground.height - band_height)))
        x = int(rng.integers(_MARGIN, max(_MARGIN + 1, ground.width - width - _MARGIN)))
        ground.paste(paper, (0, y, ground.width, y + band_height))
        spot = (x, y + _MARGIN)
    else:
        spot = tuple(
            int(rng.integers(_MARGIN, max(_MARGIN + 1, whole - part - _MARGIN)))
            for whole, part in ((ground.width, width), (ground.height, height))
        )
    behind = np.full((1, 1, 3), paper) if on_band else _region(ground, spot, (width, height))
    pad = _MARGIN if on_band else 0
    layer = Image.new("RGBA", (width + 2 * pad, height + 2 * pad), (*paper, 255 * on_band))
    ink = _choose_ink(rng, behind)
    at = (pad - left, pad - top)
    ImageDraw.Draw(layer).multiline_text(at, drawn, font=font, fill=(*ink, 255))
    if not on_band:  # the colour of transparent pixels is visible where edges are blended
        layer = Image.composite(layer, Image.new("RGBA", layer.size, (*ink, 0)), layer)
    corner = (spot[0] - pad, spot[1] - pad)
    if angle:
        layer = layer.rotate(angle, Image.Resampling.BICUBIC, expand=True)
        corner = tuple(
            int(np.clip(c, 0, max(0, whole - part)))
            for c, whole, part in zip(corner, ground.size, layer.size, strict=True)
        )
    ground.paste(layer, corner, layer)
    return drawn, size


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= room:
            lines[-1] = longer
        elif len(lines) < _MAX_LINES and font.getlength(word) <= room:
            lines.append(word)
        else:
            break
    return "\n".join(lines).strip("\n")


def _region(ground: Image.Image, spot: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    box = (spot[0], spot[1], spot[0] + size[0], spot[1] + size[1])
    return np.asarray(ground.crop(box))


def _choose_ink(rng: np.random.Generator, behind: np.ndarray) -> tuple[int, int, int]:
    """Returns a random ink that contrasts with the mean background, else the best one."""
    contrasts = [abs(_luma(np.array(ink)) - _luma(behind.reshape(-1, 3).mean(0))) for ink in _INKS]
    good = [
        ink for ink, contrast in zip(_INKS, contrasts, strict=True) if contrast >= _MIN_CONTRAST
    ]
    return good[rng.integers(len(good))] if good else _INKS[int(np.argmax(contrasts))]


def _luma(rgb: np.ndarray) -> float:
    return float(rgb @ np.array([0.299, 0.587, 0.114]))


def _synthetic(rng: np.random.Generator) -> Image.Image:
    return render_scene(rng, sample_scene(rng), _SYNTHETIC_SIDE)


def _read_photos(path: str | pathlib.Path) -> list[Image.Image]:
    with tarfile.open(path) as tar:
        names = [m.name for m in tar if m.isfile() and m.name.lower().endswith((".jpg", ".jpeg"))]
        photos = [decode_rgb(tar.extractfile(name).read()) for name in sorted(names)]
    if not photos:
        raise ValueError(f"'{path}' holds no JPEG file; expected a tar of photos")
    return photos


def _read_captions(captions: str | pathlib.Path | Sequence[str]) -> list[str]:
    name = "captions"
    if isinstance(captions, str | pathlib.Path):
        name = f"'{captions}'"
        captions = pathlib.Path(captions).read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in captions]
    lines = [line for line in lines if len(line) >= 20]
    if len(lines) < 100:
        raise ValueError(f"{name} holds {len(lines)} captions of 20 characters; expected 100")
    return lines


@functools.cache
def _load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    # A path, or the name of a font of matplotlib.
    path = pathlib.Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    # The basic layout engine makes images independent of whether raqm is installed.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
