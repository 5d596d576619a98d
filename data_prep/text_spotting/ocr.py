"""EasyOCR's English networks, run fast: heat maps, boxes, and the text in a box.

The networks, their weights and everything around them are EasyOCR's
(CRAFT and a CRNN), so that boxes and texts are those of `easyocr.Reader.readtext` on the same
array at the same settings, up to rounding and to the size of the canvas. Ours is how they are run:
in batches on few canvases (the networks themselves are in `networks`), and no work for boxes that
nobody asks about. Captions and decisions must not come in; torch and easyocr are imported when the
networks are loaded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.jobs.models import is_shared, open_model
from data_prep.text_spotting.networks import CROP_HEIGHT, OcrSettings, load_networks, resolve

# Quarters of the longer side that a side of a canvas may have.
CANVAS_STEPS = (2, 3, 4)
_MIN_BOX_SIDE = 20  # px, of the longer side; EasyOCR's `min_size`
# EasyOCR's grouping of words into lines.
_GROUPING = {
    "slope_ths": 0.1,
    "ycenter_ths": 0.5,
    "height_ths": 0.5,
    "width_ths": 0.5,
    "add_margin": 0.1,
}

# A level line is x_min, x_max, y_min, y_max; any other is x, y of its four corners.
Box = tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Shrunk:
    """A picture at the size at which text is looked for.

    Attributes:
        pixels: uint8 [h, w, 3], blue first.
        scale: px of the picture per px of the shrunk one.
    """

    pixels: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True)
class HeatMaps:
    """The detector's output for one picture.

    Attributes:
        text: float32 [h/2, w/2] of the shrunk picture, score of being inside a character.
        link: likewise, of being between two characters of a word.
        scale: px of the picture per px of the shrunk one.
    """

    text: np.ndarray
    link: np.ndarray
    scale: float


def resolve_for_networks(settings: OcrSettings) -> OcrSettings:
    """The settings with "auto" replaced by what it means where the networks run.

    Raises:
        ValueError: a setting cannot be met there.
    """
    if not is_shared():
        return resolve(settings)  # which does not load them
    return next(open_model(functools.partial(load_networks, settings)).map("describe", [()]))


class Ocr:
    """Boxes and texts of pictures; forms the batches that the networks run on."""

    def __init__(self, settings: OcrSettings):
        """Finds the networks: they are loaded for the first batch of a process, or shared."""
        self.settings = settings
        self._networks = open_model(functools.partial(load_networks, settings))

    def peaks(self, pictures: Sequence[Shrunk], side: int, batch_size: int = 8) -> list[float]:
        """The highest character score (0 to 1) of each picture; arguments of `heat_maps`."""
        results = [0.0] * len(pictures)
        for batch, found in self._run("peaks", pictures, side, batch_size):
            for i, peak in zip(batch, found, strict=True):
                results[i] = peak
        return results

    def heat_maps(
        self, pictures: Sequence[Shrunk], side: int | None = None, batch_size: int = 8
    ) -> list[HeatMaps]:
        """Runs the detector on pictures, in their order, in batches on canvases of one size.

        Args:
            pictures: of `shrink`.
            side: px of the longer side to which they were shrunk; the canvases are those of
                `canvas_shape`. None takes EasyOCR's, of which there are many more.
            batch_size: most pictures in one batch.
        """
        maps: list[Any] = [None] * len(pictures)
        for batch, found in self._run("detect", pictures, side, batch_size):
            for i, scores in zip(batch, found, strict=True):
                height, width = (-(-n // 32) * 16 for n in pictures[i].pixels.shape[:2])
                text, link = (np.ascontiguousarray(one[:height, :width]) for one in scores)
                maps[i] = HeatMaps(text, link, pictures[i].scale)
        return maps

    def find_boxes(self, maps: HeatMaps) -> list[Box]:
        """The lines of text, in the px of the picture, as `Reader.detect` finds them."""
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
        """Reads lines of `crop_line`, in batches of crops that are padded to the same width.

        Returns:
            Text and confidence (0 to 1, EasyOCR's product over the line) of each; ("", 0.0) for
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
    ) -> Iterator[tuple[list[int], Any]]:
        """Each batch of pictures, as indices, with what the networks make of it."""
        shapes = {i: canvas_shape(p.pixels.shape[:2], side) for i, p in enumerate(pictures)}
        batches = list(like_batches(shapes, batch_size))

        def stack(batch: list[int]) -> tuple[np.ndarray]:
            canvases = np.zeros((len(batch), *shapes[batch[0]], 3), np.uint8)
            for canvas, pixels in zip(canvases, (pictures[i].pixels for i in batch), strict=True):
                canvas[: pixels.shape[0], : pixels.shape[1]] = pixels
            return (canvases,)

        return zip(batches, self._networks.map(method, map(stack, batches)), strict=True)


def shrink(image: np.ndarray, side: int) -> Shrunk:
    """Shrinks a picture, as EasyOCR does, so that its longer side has at most `side` px.

    It samples and does not average, which keeps thin strokes dark: at 160 px the detector then
    sees more of small text than after any smoothing. The image is uint8 [h, w, 3], blue first.
    """
    import cv2

    height, width = image.shape[:2]
    ratio = min(side, max(height, width)) / max(height, width)
    size = max(1, int(width * ratio)), max(1, int(height * ratio))
    return Shrunk(cv2.resize(image, size, interpolation=cv2.INTER_LINEAR), 1 / ratio)


def crop_line(grey: np.ndarray, box: Box) -> tuple[np.ndarray, int] | None:
    """Cuts a line out of uint8 [h, w] as EasyOCR does; None for a box without a pixel.

    Returns:
        The line, 64 px high, and the width to which it will be padded.
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
    """(left, right, top, bottom) of the upright rectangle around a box, in px."""
    if len(box) == 4:
        left, right, top, bottom = box
        return left, right, top, bottom
    return min(box[::2]), max(box[::2]), min(box[1::2]), max(box[1::2])


def box_size(box: Box) -> tuple[float, float]:
    """Width and height of the upright rectangle around a box, in px."""
    left, right, top, bottom = box_sides(box)
    return right - left, bottom - top


def canvas_shape(size: tuple[int, int], side: int | None) -> tuple[int, int]:
    """Height and width of the canvas that holds a shrunk picture.

    Ours: half, three quarters and all of the longer side, rounded up to the detector's multiple of
    32, so that there are nine canvases and batches fill. The common shapes (1:1, 4:3, 3:2 and
    upright) come to lie on what EasyOCR gives them anyway.

    Args:
        size: height and width of the picture.
        side: px of the longer side to which pictures were shrunk; None for EasyOCR's canvas, the
            next multiples of 32.
    """
    steps = [0] if side is None else [-(-side * k // 128) * 32 for k in CANVAS_STEPS]
    height, width = (
        min((step for step in steps if step >= length), default=-(-length // 32) * 32)
        for length in size
    )
    return height, width


def like_batches(likes: Mapping[int, Any], batch_size: int) -> Iterator[list[int]]:
    """Keys of equal values, in order of appearance, at most `batch_size` together."""
    groups: dict[Any, list[int]] = {}
    for index, like in likes.items():
        groups.setdefault(like, []).append(index)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]
