"""Windows of thumbnails against Pillow's, and what is found by them."""

import numpy as np
from PIL import Image

from data_prep.duplicates.pictures import SIDE, correlate, cut_windows, describe_picture, verify
from data_prep.duplicates.semdedup import Near
from tests.make import encoded


def _picture(seed: int, side: int = 320) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (9, 9), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def _thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))


def test_windows_are_those_that_pillow_cuts():
    thumbnail = _thumbnail(_picture(0))
    found = cut_windows(thumbnail)
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


def test_crops_mirror_images_and_nothing_else_correlate():
    whole = _picture(1)
    crop = whole.crop((20, 5, 20 + 288, 5 + 288))
    pictures = [
        whole,
        crop,
        crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        *(_picture(seed) for seed in range(2, 8)),
        Image.new("L", (50, 50), 90),
    ]
    thumbnails = np.stack([_thumbnail(picture).ravel() for picture in pictures])
    windows = list(map(cut_windows, thumbnails))

    def like(one, other, mirrored=True):
        return correlate(windows[one], windows[other], mirrored=mirrored)

    assert min(like(0, 1), like(1, 0), like(0, 2)) > 0.97
    assert max(like(0, other) for other in range(3, 9)) < 0.8
    assert like(0, 9) == 0  # flat
    assert like(0, 2, mirrored=False) < 0.9

    def candidates():
        yield Near(np.array([1, 4]), np.array([3, 3]), np.array([0.99, 0.98], np.float32))
        yield Near(np.array([1, 2]), np.array([0, 1]), np.array([0.9, 0.8], np.float32))

    found = verify(candidates(), thumbnails, 0.95, mirrored=True)
    assert (found.dropped.tolist(), found.alike.tolist()) == ([1, 2], [0, 1])
    assert found.similarity[0] == np.float32(like(1, 0))


def test_thumbnails_are_greys_of_the_decoded_picture():
    image = _picture(3).convert("RGB")
    _, greys, size = describe_picture(encoded(image), mirrored=True, max_pixels=10**6)
    assert size == image.size and greys.dtype == np.uint8
    assert np.abs(greys - _thumbnail(_picture(3)).astype(int)).max() <= 1
