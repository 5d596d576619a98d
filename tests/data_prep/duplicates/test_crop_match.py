"""Windows of thumbnails against Pillow's, and what is found by them."""

import numpy as np
from PIL import Image

from data_prep.duplicates.pictures import (
    SIDE,
    cut_windows,
    describe_picture,
    has_colors_of,
    lay_over,
)
from tests.make import encoded


def _picture(seed: int, side: int = 320) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 9), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def _thumbnail(image: Image.Image) -> np.ndarray:
    return describe_picture(encoded(image), mirrored=False, max_pixels=10**6)[1]


def test_windows_are_those_that_pillow_cuts():
    thumbnail = _thumbnail(_picture(0))
    found = cut_windows(thumbnail)
    thumbnail = thumbnail[: SIDE * SIDE].reshape(SIDE, SIDE)
    boxes = [
        (left * 0.025, top * 0.025, size)
        for size in (1.0, 0.95, 0.9, 0.85)
        for top in range(round((1 - size) / 0.025) + 1)
        for left in range(round((1 - size) / 0.025) + 1)
    ]
    assert found.shape == (len(boxes), 256) == (84, 256)
    image = Image.fromarray(thumbnail.astype(np.float32))
    for (left, top, size), row in zip(boxes, found, strict=True):
        box = (left * SIDE, top * SIDE, (left + size) * SIDE, (top + size) * SIDE)
        cells = np.asarray(image.resize((16, 16), Image.Resampling.BOX, box=box), np.float64)
        cells = cells.ravel() - cells.mean()
        # Pillow's box filter takes the nearest whole pixels; ours shares those at the edges.
        assert row @ (cells / np.linalg.norm(cells)) > 0.985


def test_a_mirrored_crop_is_found_from_either_picture():
    whole = _picture(1)
    crop = whole.crop((20, 5, 20 + 288, 5 + 288)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pictures = [_thumbnail(whole), _thumbnail(crop)]
    windows = list(map(cut_windows, pictures))
    for one, other in ((0, 1), (1, 0)):
        found = lay_over(windows[one], windows[other], mirrored=True)
        # The window is one of the whole picture, on whichever side that stands.
        assert found.correlation > 0.97 and found.is_mirrored
        assert found.is_first_cut == (one == 0)
        assert has_colors_of(pictures[0], pictures[1], found, 0.06)
