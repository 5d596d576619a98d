"""Descriptors that find candidate copies of an image, and thumbnails that verify them.

The descriptor is a vector of 96 numbers that survives resizing, re-encoding and small crops. It is
ours, and simple on purpose: lightness at 8 x 8, without its mean, and both colour differences at
4 x 4. It does not represent the content of an image. It finds edited copies, but not other images
of the same object; use embeddings of a model for those.

A crop moves every cell of a descriptor, which lowers its cosine to that of merely similar images.
Crop matching compares one whole thumbnail with windows of the other one, with 85% to 100% of its
sides at offsets of 2.5%, in both directions. The score is the highest correlation of the grey
values; copies reach 0.95, see docs/benchmarks/filter.md. Drawings with the same outline on the same
background reach it as well. Local colours distinguish them: the window is moved and scaled to the
best fit, and then the mean colour of each of 8 x 8 parts has to agree with the other image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_prep.duplicates.rows import Near
from diht_jax.input.transforms import load_rgb, open_image

# Increase when equal images start to produce different numbers.
DESCRIPTOR_VERSION = 2

SIDE = 32  # px; thumbnails store lightness at this size, and colours at half of it

_DECODED = 64  # px per side of the image that is averaged to the cells of a descriptor
_LIGHT_CELLS, _COLOR_CELLS = 8, 4
_LEAST_COLOR = 100.0  # lower limit of the colour norm: does not amplify the noise of grey images
_COLOR_WEIGHT = 0.5

_CELLS = 16  # cells per side of a window, for the correlation
_SIZES = (1.0, 0.95, 0.9, 0.85)
_STEP = 0.025
_LEAST_SPREAD = 2.0  # standard deviation of the grey values; flatter images are mostly noise
_CACHED = 2048  # pictures whose windows are kept: 86 kB each

_PARTS = 8  # parts per side, for the comparison of colours
_FITTED = 3  # a fit cannot repair differences above this multiple of the limit
_ROUNDS = 3  # iterations of the window fit
_NUDGE, _LONGEST_STEP = 0.004, 0.02  # of the position and size of a window, as shares of the side


def describe_picture(
    data: bytes, *, mirrored: bool, max_pixels: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Computes the descriptor and the thumbnail of an encoded image.

    Args:
        mirrored: give an image and its mirror image equal descriptors.
        max_pixels: larger images are not decoded.

    Returns:
        The descriptor, float32 [96] of length 1, or 0 for an image of uniform grey. The thumbnail,
        uint8 [1536]: lightness at SIDE x SIDE, both colour differences at half of it. The size.

    Raises:
        ImageError: the image cannot be decoded.
    """
    image = open_image(data, max_pixels=max_pixels)
    size = image.size
    if image.format == "JPEG":
        image.draft("RGB", (2 * _DECODED, 2 * _DECODED))  # decodes a reduced size
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
    """Averages a channel [64, 64] to [cells, cells]."""
    return channel.reshape(cells, _DECODED // cells, cells, _DECODED // cells).mean((1, 3))


def _fold(grid: np.ndarray) -> np.ndarray:
    """Returns a grid's sum with its mirror image and their absolute difference; norm is kept."""
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
    """Finds each row's first candidate that is a copy; its similarity is the correlation.

    Args:
        candidates: from `search.find_candidates`: the best candidates of all rows, then the second
            best, and so on.
        thumbnails: uint8 [n, 1536], thumbnails of the rows.
        least: minimum correlation of copies.
        difference: maximum colour difference of copies in any part, as a share of the value range;
            see `has_colors_of`.
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
    """Alignment of one whole image with a window of another image.

    Attributes:
        correlation: correlation of the grey values.
        is_first_cut: whether the window is in the first image.
        is_mirrored: whether the whole image is mirrored.
    """

    correlation: float
    window: int
    is_first_cut: bool
    is_mirrored: bool


def lay_over(one: np.ndarray | None, other: np.ndarray | None, *, mirrored: bool) -> Overlay | None:
    """Returns the alignment with the highest correlation; None if either image is flat."""
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
    """Returns whether the colours of two aligned images agree in all parts.

    Args:
        cut: uint8 [1536], the thumbnail with the window.
        whole: uint8 [1536], the other thumbnail.
        difference: maximum difference as a share of the value range; 1 accepts all.
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
    """Splits a thumbnail into lightness and both colour differences, float32 [side, side]."""
    half = SIDE // 2
    parts = np.split(thumbnail.astype(np.float32), [SIDE * SIDE, SIDE * SIDE + half * half])
    return [part.reshape(side, side) for part, side in zip(parts, (SIDE, half, half), strict=True)]


def _average_window(planes: list[np.ndarray], window: np.ndarray, cells: int) -> np.ndarray:
    """Averages a window (top, left, height, width) to cells: float [planes, cells, cells]."""
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
    """Moves and scales a window to fit the wanted cells (Gauss-Newton)."""

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
    """Cuts all windows of an image, float32 [84, 256], normalised to mean 0 and length 1.

    Windows without contrast are 0. Returns None if the whole image is flat.
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
    """Returns averaging matrices per window size: float32 [windows * _CELLS, SIDE]."""
    found = []
    for size in _SIZES:
        rows = [_average_cells(start, size, _CELLS, SIDE) for start in _starts(size)]
        found.append(np.concatenate(rows).astype(np.float32))
    return found


@functools.cache
def _window_places() -> np.ndarray:
    """Returns top, left, height and width of all windows as shares of the side: float [84, 4]."""
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
    """Returns the weights of the pixels along a side for each cell, float [cells, side]."""
    edges = (start + size * np.arange(cells + 1) / cells) * side
    pixels = np.arange(side)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(shared, 0) * (cells / (size * side))
