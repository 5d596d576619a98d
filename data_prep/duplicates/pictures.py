"""Two views of a picture: a descriptor finds candidates, a thumbnail verifies them.

The descriptor is 96 numbers that survive another size, another encoding and small crops. It is
ours, and simple on purpose: lightness at 8 x 8 and both colour differences at 4 x 4, lightness
without its mean. It knows nothing of what a picture shows, so it finds copies that were edited and
not other pictures of the same thing; for those take embeddings of a model.

A crop moves every cell of a descriptor, so that its cosine is no higher than that of some pictures
that are merely alike. Crop matching compares the whole of one thumbnail with windows of the other,
of 85% to 100% of its sides at offsets of 2.5%, both ways round. The score is the highest
correlation of the greys; copies reach 0.95, see docs/benchmarks/filter.md. So do drawings of one
outline on one ground, which correlate by these. What tells them apart are colours, part by part:
the window is moved and stretched until it fits best, and then the mean colour of each of 8 x 8
parts must be that of the other picture.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.duplicates.rows import Near
from diht_jax.input.transforms import load_rgb, open_image

# Raised whenever equal pictures come to have other numbers.
DESCRIPTOR_VERSION = 2

SIDE = 32  # px of a thumbnail, of whose colours every second one is kept in each direction

_DECODED = 64  # px of a side, at which the cells of a descriptor are averaged
_LIGHT_CELLS, _COLOR_CELLS = 8, 4
_LEAST_COLOR = 100.0  # grey pictures have no colour to be compared by: noise is not scaled up
_COLOR_WEIGHT = 0.5

_CELLS = 16  # of a window and side, that are correlated
_SIZES = (1.0, 0.95, 0.9, 0.85)
_STEP = 0.025
_LEAST_SPREAD = 2.0  # standard deviation of the greys; of flatter pictures noise would decide
_CACHED = 2048  # pictures whose windows are kept: 86 kB each

_PARTS = 8  # of a side, whose colours are compared
_FITTED = 3  # differences that are larger by more than this, a fit does not mend
_ROUNDS = 3  # of the fit of a window
_NUDGE, _LONGEST_STEP = 0.004, 0.02  # of a window's place and size, as shares of the side


def describe_picture(
    data: bytes, *, mirrored: bool, max_pixels: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The descriptor and the thumbnail of an encoded picture.

    Args:
        mirrored: a picture and its mirror image get the same numbers.
        max_pixels: of a larger one nothing is decoded.

    Returns:
        float32 [96] of length 1, or 0 for a picture of one grey; uint8 [1536], the lightness at
        SIDE x SIDE and both colour differences at half of it; width and height.

    Raises:
        ImageError: no picture.
    """
    image = open_image(data, max_pixels=max_pixels)
    size = image.size
    if image.format == "JPEG":
        image.draft("RGB", (2 * _DECODED, 2 * _DECODED))  # decoded at a fraction of its size
    image = load_rgb(image).convert("YCbCr").resize((_DECODED, _DECODED), Image.Resampling.BILINEAR)
    channels = np.asarray(image, np.float32)
    light = _average(channels[..., 0], _LIGHT_CELLS)
    light -= light.mean()
    light /= max(float(np.linalg.norm(light)), 1e-6)
    colors = [_average(channels[..., i], _COLOR_CELLS) - 128 for i in (1, 2)]
    parts = [_fold(part) if mirrored else part.ravel() for part in (light, *colors)]
    color = np.concatenate(parts[1:])
    color *= _COLOR_WEIGHT / max(float(np.linalg.norm(color)), _LEAST_COLOR)
    found = np.concatenate([parts[0], color])
    sides = (SIDE, SIDE // 2, SIDE // 2)
    planes = [_average(channels[..., i], side).ravel() for i, side in enumerate(sides)]
    thumbnail = np.round(np.concatenate(planes)).astype(np.uint8)
    return found / max(float(np.linalg.norm(found)), 1e-6), thumbnail, size


def _average(channel: np.ndarray, cells: int) -> np.ndarray:
    """[64, 64] -> means [cells, cells]."""
    return channel.reshape(cells, _DECODED // cells, cells, _DECODED // cells).mean((1, 3))


def _fold(grid: np.ndarray) -> np.ndarray:
    """Sum of the grid and its mirror image, and the size of their difference; length is kept."""
    half = grid.shape[1] // 2
    left, right = grid[:, :half], grid[:, ::-1][:, :half]
    return np.concatenate([(left + right).ravel(), np.abs(left - right).ravel()]) / np.sqrt(2)


def verify(
    candidates: Iterator[Near],
    thumbnails: np.ndarray,
    least: float,
    difference: float,
    *,
    mirrored: bool,
) -> Near:
    """The first candidate of each row that is a copy, with the correlation as similarity.

    Args:
        candidates: of `search.find_candidates`: the best partner of every row, then the second
            best.
        thumbnails: uint8 [n, 1536], of the rows.
        least: correlation from which two pictures are copies.
        difference: largest difference of colours, as a share of their range, that a copy may have
            in a part; see `has_colors_of`.
    """
    windows = functools.lru_cache(_CACHED)(lambda row: cut_windows(thumbnails[row]))
    found: dict[int, tuple[int, float]] = {}
    for rank in candidates:
        for row, alike in zip(rank.rows.tolist(), rank.alike.tolist(), strict=True):
            if row in found:
                continue
            overlay = lay_over(windows(row), windows(alike), mirrored=mirrored)
            if overlay is None or overlay.correlation < least:
                continue
            cut, whole = (row, alike) if overlay.is_first_cut else (alike, row)
            if has_colors_of(thumbnails[cut], thumbnails[whole], overlay, difference):
                found[row] = alike, overlay.correlation
    alike, similarities = zip(*found.values(), strict=True) if found else ((), ())
    return Near(
        np.array(list(found), np.int64),
        np.array(alike, np.int64),
        np.array(similarities, np.float32),
    )


class Overlay(NamedTuple):
    """Placement of the whole of one picture over a window of another.

    Attributes:
        correlation: of the greys.
        is_first_cut: whether it is one of the first picture.
        is_mirrored: whether the whole picture is mirrored.
    """

    correlation: float
    window: int
    is_first_cut: bool
    is_mirrored: bool


def lay_over(one: np.ndarray | None, other: np.ndarray | None, *, mirrored: bool) -> Overlay | None:
    """The overlay of two pictures, by their windows, that correlates most; None if one is flat."""
    if one is None or other is None:
        return None
    found = []
    for is_first_cut, cut, whole in ((True, one, other[0]), (False, other, one[0])):
        for is_mirrored in (False, True) if mirrored else (False,):
            cells = whole.reshape(_CELLS, _CELLS)
            correlations = cut @ (cells[:, ::-1] if is_mirrored else cells).ravel()
            best = int(correlations.argmax())
            found.append(Overlay(float(correlations[best]), best, is_first_cut, is_mirrored))
    return max(found)


def has_colors_of(cut: np.ndarray, whole: np.ndarray, overlay: Overlay, difference: float) -> bool:
    """Tells whether no part of an overlay differs by more than a share of the range of colours.

    Args:
        cut: uint8 [1536], the thumbnail with the window.
        whole: uint8 [1536], the other one.
        difference: the share; 1 allows all.
    """
    if difference >= 1:
        return True
    planes, wanted = _planes(cut), _planes(whole)
    if overlay.is_mirrored:
        wanted = [plane[:, ::-1] for plane in wanted]
    everything = np.array([0.0, 0.0, 1.0, 1.0])
    colors = _average_window(wanted, everything, _PARTS)

    def largest(window: np.ndarray) -> float:
        distances = np.linalg.norm(_average_window(planes, window, _PARTS) - colors, axis=0)
        return float(distances.max()) / 255

    window = _window_places()[overlay.window]
    found = largest(window)
    if difference < found <= _FITTED * difference:
        greys = _average_window(wanted[:1], everything, _CELLS)[0]
        found = min(found, largest(_fit_window(planes[0], greys, window)))
    return found <= difference


def _planes(thumbnail: np.ndarray) -> list[np.ndarray]:
    """Lightness and both colour differences of a thumbnail, float32 [side, side]."""
    half = SIDE // 2
    parts = np.split(thumbnail.astype(np.float32), [SIDE * SIDE, SIDE * SIDE + half * half])
    return [part.reshape(side, side) for part, side in zip(parts, (SIDE, half, half), strict=True)]


def _average_window(planes: list[np.ndarray], window: np.ndarray, cells: int) -> np.ndarray:
    """Means of the cells of a window (top, left, height, width): float [planes, cells, cells]."""
    top, left, height, width = window
    return np.stack(
        [
            _average_cells(top, height, cells, len(plane))
            @ plane
            @ _average_cells(left, width, cells, len(plane)).T
            for plane in planes
        ]
    )


def _fit_window(plane: np.ndarray, wanted: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Moves and stretches a window until its cells are most like those wanted (Gauss-Newton)."""

    def look(window: np.ndarray) -> np.ndarray:
        return _average_window([plane], window, len(wanted)).ravel()

    best, least = window, np.inf
    for number in range(_ROUNDS + 1):
        missing = wanted.ravel() - look(window)
        if (error := missing @ missing) < least:
            best, least = window, error
        if number < _ROUNDS:
            nudges = _NUDGE * np.eye(4)
            slopes = [(look(window + n) - look(window - n)) / (2 * _NUDGE) for n in nudges]
            step, *_ = np.linalg.lstsq(np.stack(slopes, axis=1), missing, rcond=1e-3)
            window = window + step.clip(-_LONGEST_STEP, _LONGEST_STEP)
            place = window[:2].clip(0, 1 - _SIZES[-1])
            window = np.concatenate([place, np.minimum(window[2:], 1 - place)])
    return best


def cut_windows(thumbnail: np.ndarray) -> np.ndarray | None:
    """All windows of a picture, float32 [84, 256], of mean 0 and length 1; None if it is flat.

    A window without contrast is 0.
    """
    greys = _planes(thumbnail)[0]
    if greys.std() < _LEAST_SPREAD:
        return None
    found = []
    for rows in _averages():
        cells = (rows @ greys @ rows.T).reshape(-1, _CELLS, rows.shape[0] // _CELLS, _CELLS)
        found.append(cells.transpose(0, 2, 1, 3).reshape(-1, _CELLS * _CELLS))
    windows = np.concatenate(found)
    windows -= windows.mean(1, keepdims=True)
    lengths = np.linalg.norm(windows, axis=1, keepdims=True)
    is_flat = lengths < _LEAST_SPREAD * _CELLS
    return np.where(is_flat, 0, windows / np.maximum(lengths, 1e-6))


@functools.cache
def _averages() -> list[np.ndarray]:
    """Windows along a side by size: float32 [windows * _CELLS, SIDE], means of cells."""
    found = []
    for size in _SIZES:
        rows = [_average_cells(start, size, _CELLS, SIDE) for start in _starts(size)]
        found.append(np.concatenate(rows).astype(np.float32))
    return found


@functools.cache
def _window_places() -> np.ndarray:
    """Top, left, height and width of the windows, as shares of the side: float [84, 4]."""
    places = [
        (top, left, size, size)
        for size in _SIZES
        for top in _starts(size)
        for left in _starts(size)
    ]
    return np.array(places)


def _starts(size: float) -> list[float]:
    return [number * _STEP for number in range(round((1 - size) / _STEP) + 1)]


def _average_cells(start: float, size: float, cells: int, side: int) -> np.ndarray:
    """Weights of the pixels of a side in the cells of a window, float [cells, side]."""
    edges = (start + size * np.arange(cells + 1) / cells) * side
    pixels = np.arange(side)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(shared, 0) * (cells / (size * side))
