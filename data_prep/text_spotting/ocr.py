"""Fast inference with EasyOCR's English networks: heat maps, boxes, and the text in a box.

The networks (CRAFT and a CRNN), weights and post-processing are EasyOCR's. Boxes and texts equal
those of `easyocr.Reader.readtext` for the same array and settings, up to rounding and canvas size.
Ours: pictures run in batches on few canvas shapes (`networks` runs the networks), and only the
boxes that a caller asks for are read. Captions and decisions do not belong here. torch and easyocr
are imported when the networks are loaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.jobs.models import is_shared, open_model
from data_prep.text_spotting.networks import CROP_HEIGHT, OcrSettings, load_networks, resolve

# Sides of a canvas, in quarters of the longer side.
CANVAS_STEPS = (2, 3, 4)
_MIN_BOX_SIDE = 20  # px of the longer side; EasyOCR's `min_size`
# EasyOCR's parameters for grouping words into lines.
_GROUPING = {
    "slope_ths": 0.1,
    "ycenter_ths": 0.5,
    "height_ths": 0.5,
    "width_ths": 0.5,
    "add_margin": 0.1,
}

# (x_min, x_max, y_min, y_max) of a level line; x, y of the four corners of any other line.
Box = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A picture shrunk for text detection.

    Attributes:
        pixels: uint8 [h, w, 3], BGR.
        scale: px of the picture per px of the shrunk one.
    """

    pixels: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """The detector's output for one picture.

    Attributes:
        text: float32 [h/2, w/2] of the shrunk picture, score of being inside a character.
        link: same shape, score of being between two characters of a word.
        scale: px of the picture per px of the shrunk one.
    """

    text: np.ndarray
    link: np.ndarray
    scale: float


def resolve_for_networks(settings: OcrSettings) -> OcrSettings:
    """Returns the settings with "auto" replaced by its value where the networks run.

    Raises:
        ValueError: a setting is not supported there.
    """
    if not is_shared():
        return resolve(settings)  # does not load the networks
    return next(open_model(functools.partial(load_networks, settings)).map("describe", [()]))


class Ocr:
    """Finds boxes and reads texts, in batches of pictures and of crops."""

    def __init__(self, settings: OcrSettings):
        """Opens the networks, which are shared or are loaded for the first batch of a process."""
        self.settings = settings
        self._networks = open_model(functools.partial(load_networks, settings))

    def peaks(self, pictures: Sequence[Shrunk], side: int, batch_size: int = 8) -> list[float]:
        """Returns each picture's highest character score (0 to 1). Arguments as for `heat_maps`."""
        peaks = dict(self._run("peaks", pictures, side, batch_size))
        return [peaks[i] for i in range(len(pictures))]

    def heat_maps(
        self, pictures: Sequence[Shrunk], side: int | None = None, batch_size: int = 8
    ) -> list[HeatMaps]:
        """Runs the detector on pictures, in batches of equal canvas size. Keeps their order.

        Args:
            pictures: pictures from `shrink`.
            side: px of the longer side to which they were shrunk; canvases are chosen by
                `canvas_shape`. None uses EasyOCR's canvases, which have many more shapes.
            batch_size: maximum number of pictures in a batch.
        """
        maps: list[Any] = [None] * len(pictures)
        for i, scores in self._run("detect", pictures, side, batch_size):
            height, width = (-(-n // 32) * 16 for n in pictures[i].pixels.shape[:2])
            text, link = (np.ascontiguousarray(one[:height, :width]) for one in scores)
            maps[i] = HeatMaps(text, link, pictures[i].scale)
        return maps

    def find_boxes(self, maps: HeatMaps) -> list[Box]:
        """Returns the lines of text, in px of the picture, as `Reader.detect` finds them."""
        from easyocr.craft_utils import adjustResultCoordinates, getDetBoxes
        from easyocr.utils import group_text_box

        s = self.settings
        quads, _, _ = getDetBoxes(
            maps.text, maps.link, s.text_threshold, s.link_threshold, s.low_text, False, False
        )
        quads = adjustResultCoordinates(quads, maps.scale, maps.scale)
        corners = [np.array(quad).astype(np.int32).reshape(-1) for quad in quads]
        if not corners:
            return []
        level, turned = group_text_box(corners, sort_output=True, **_GROUPING)
        boxes: list[tuple[float, ...]] = [tuple(int(v) for v in box) for box in level]
        boxes += [tuple(float(v) for corner in box for v in corner) for box in turned]
        return [box for box in boxes if max(box_size(box)) > _MIN_BOX_SIDE]

    def read(
        self, crops: Sequence[tuple[np.ndarray, int] | None], batch_size: int = 16
    ) -> list[tuple[str, float]]:
        """Reads crops from `crop_line`, in batches that are padded to the same width.

        Returns:
            Text and confidence of each (0 to 1, EasyOCR's product over the line); ("", 0.0) for
            None.
        """
        results = [("", 0.0)] * len(crops)
        there = {i: crop for i, crop in enumerate(crops) if crop is not None}
        widths = {i: width for i, (_, width) in there.items()}
        batches = list(like_batches(widths, batch_size))
        calls = (([there[i][0] for i in batch], widths[batch[0]]) for batch in batches)
        for batch, read in zip(batches, self._networks.map("read", calls), strict=True):
            for i, result in zip(batch, read, strict=True):
                results[i] = result
        return results

    def _run(
        self, method: str, pictures: Sequence[Shrunk], side: int | None, batch_size: int
    ) -> Iterator[tuple[int, Any]]:
        """Yields the indices of the pictures, batch by batch, with the networks' results."""
        shapes = {i: canvas_shape(p.pixels.shape[:2], side) for i, p in enumerate(pictures)}
        batches = list(like_batches(shapes, batch_size))

        def stack(batch: list[int]) -> tuple[np.ndarray]:
            canvases = np.zeros((len(batch), *shapes[batch[0]], 3), np.uint8)
            for canvas, pixels in zip(canvases, (pictures[i].pixels for i in batch), strict=True):
                canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
            return (canvases,)

        results = self._networks.map(method, map(stack, batches))
        for batch, found in zip(batches, results, strict=True):
            yield from zip(batch, found, strict=True)


def shrink(image: np.ndarray, side: int) -> Shrunk:
    """Shrinks a uint8 [h, w, 3] BGR image to at most `side` px on the longer side, as EasyOCR does.

    Bilinear sampling without averaging keeps thin strokes dark: at 160 px the detector sees more
    small text than after any smoothing.
    """
    import cv2

    height, width = image.shape[:2]
    ratio = min(side, max(height, width)) / max(height, width)
    size = max(1, int(width * ratio)), max(1, int(height * ratio))
    return Shrunk(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), 1 / ratio)


def crop_line(grey: np.ndarray, box: Box) -> tuple[np.ndarray, int] | None:
    """Cuts a line out of a uint8 [h, w] image, as EasyOCR does.

    Returns:
        The line, 64 px high, and the width to which it will be padded; None for an empty box.
    """
    from easyocr.utils import get_image_list

    if len(box) == 4:
        x_min, x_max, y_min, y_max = box
        height, width = grey.shape
        if min(x_max, width) <= max(x_min, 0) or min(y_max, height) <= max(y_min, 0):
            return None
        level, turned = [list(box)], []
    else:
        if min(box_size(box)) < 2:
            return None
        level, turned = [], [np.reshape(box, (4, 2)).tolist()]
    crops, width = get_image_list(level, turned, grey, model_height=CROP_HEIGHT)
    return (crops[0][1], int(width)) if crops else None


def box_sides(box: Sequence[float]) -> tuple[float, float, float, float]:
    """Returns (left, right, top, bottom) of the upright rectangle around a box, in px."""
    if len(box) == 4:
        left, right, top, bottom = box
        return left, right, top, bottom
    return min(box[::2]), max(box[::2]), min(box[1::2]), max(box[1::2])


def box_size(box: Box) -> tuple[float, float]:
    """Returns width and height of the upright rectangle around a box, in px."""
    left, right, top, bottom = box_sides(box)
    return right - left, bottom - top


def canvas_shape(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """Returns height and width of the canvas for a shrunk picture.

    Ours: each side is half, three quarters or all of the longer side, rounded up to a multiple of
    32 for the detector. With only nine canvases, batches fill up. Pictures of the common shapes
    (1:1, 4:3, 3:2, landscape and portrait) get the same canvas as from EasyOCR.

    Args:
        size: height and width of the picture.
        side: px of the longer side to which pictures were shrunk. None returns EasyOCR's canvas:
            the next multiples of 32.
    """
    steps = [0] if side is None else [-(-side * k // 128) * 32 for k in CANVAS_STEPS]
    height, width = (
        min((step for step in steps if step >= length), default=-(-length // 32) * 32)
        for length in size
    )
    return height, width


def like_batches(likes: Mapping[int, Any], batch_size: int) -> Iterator[list[int]]:
    """Yields batches of at most `batch_size` keys with equal values, in order of appearance."""
    groups: dict[Any, list[int]] = {}
    for index, like in likes.items():
        groups.setdefault(like, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
