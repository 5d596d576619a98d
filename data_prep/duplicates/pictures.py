"""Two views of a picture: a descriptor finds candidates, a thumbnail verifies them.

The descriptor is 96 numbers that survive another size, another encoding and small crops. It is
ours, and simple on purpose: lightness at 8 x 8 and both colour differences at 4 x 4, lightness
without its mean. It knows nothing of what a picture shows, so it finds copies that were edited and
not other pictures of the same thing; for those take embeddings of a model.

A crop moves every cell of a descriptor, so that its cosine is no higher than that of some pictures
that are merely alike. Crop matching compares the whole of one thumbnail with windows of the other,
of 85% to 100% of its sides at offsets of 2.5%, both ways round and mirrored. The score is the
highest correlation of the greys; copies reach 0.95, see docs/benchmarks.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_prep.duplicates.semdedup import Near
from diht_jax.input.decode import load_rgb, open_image

# Raised whenever equal pictures come to have other numbers.
DESCRIPTOR_VERSION = 1

SIDE = 32  # px of a thumbnail

_DECODED = 64  # px of a side, at which the cells of a descriptor are averaged
_LIGHT_CELLS, _COLOR_CELLS = 8, 4
_LEAST_COLOR = 100.0  # grey pictures have no colour to be compared by: noise is not scaled up
_COLOR_WEIGHT = 0.5

_CELLS = 16  # of a window and side, that are compared
_SIZES = (1.0, 0.95, 0.9, 0.85)
_STEP = 0.025
_LEAST_SPREAD = 2.0  # standard deviation of the greys; of flatter pictures noise would decide
_CACHED = 2048  # pictures whose windows are kept: 86 kB each


def describe_picture(
    data: bytes, *, mirrored: bool, max_pixels: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The descriptor and the thumbnail of an encoded picture.

    Args:
        data: the encoded picture.
        mirrored: a picture and its mirror image get the same numbers.
        max_pixels: of a picture that is decoded.

    Returns:
        float32 [96] of length 1, or 0 for a picture of one grey; greys, uint8 [SIDE, SIDE]; width
        and height.

    Raises:
        ImageError: no picture.
    """
    image = open_image(data, max_pixels=max_pixels)
    size = image.size
    if image.format == "JPEG":
        image.draft("RGB", (2 * _DECODED, 2 * _DECODED))  # decoded at a fraction of its size
    image = load_rgb(image).convert("YCbCr").resize((_DECODED, _DECODED), Image.Resampling.BOX)
    channels = np.asarray(image, np.float32)
    light = _average(channels[..., 0], _LIGHT_CELLS)
    light -= light.mean()
    light /= max(float(np.linalg.norm(light)), 1e-6)
    colors = [_average(channels[..., i], _COLOR_CELLS) - 128 for i in (1, 2)]
    parts = [_fold(part) if mirrored else part.ravel() for part in (light, *colors)]
    color = np.concatenate(parts[1:])
    color *= _COLOR_WEIGHT / max(float(np.linalg.norm(color)), _LEAST_COLOR)
    found = np.concatenate([parts[0], color])
    greys = np.round(_average(channels[..., 0], SIDE)).astype(np.uint8)
    return found / max(float(np.linalg.norm(found)), 1e-6), greys, size


def _average(channel: np.ndarray, cells: int) -> np.ndarray:
    """[64, 64] -> means [cells, cells]."""
    return channel.reshape(cells, _DECODED // cells, cells, _DECODED // cells).mean((1, 3))


def _fold(grid: np.ndarray) -> np.ndarray:
    """Sum of the grid and its mirror image, and the size of their difference; length is kept."""
    half = grid.shape[1] // 2
    left, right = grid[:, :half], grid[:, ::-1][:, :half]
    return np.concatenate([(left + right).ravel(), np.abs(left - right).ravel()]) / np.sqrt(2)


def verify(
    candidates: Iterator[Near], thumbnails: np.ndarray, least: float, *, mirrored: bool
) -> Near:
    """The first candidate of each row that is a copy, with the correlation as similarity.

    Args:
        candidates: of `semdedup.find_candidates`: the best partner of every row, then the second
            best.
        thumbnails: uint8 [n, SIDE * SIDE], of the rows.
        least: correlation from which two pictures are copies.
        mirrored: whether mirror images are alike.
    """
    windows = functools.lru_cache(_CACHED)(lambda row: cut_windows(thumbnails[row]))
    found: dict[int, tuple[int, float]] = {}
    for rank in candidates:
        for row, alike in zip(rank.dropped.tolist(), rank.alike.tolist(), strict=True):
            if row not in found:
                similarity = correlate(windows(row), windows(alike), mirrored=mirrored)
                if similarity >= least:
                    found[row] = alike, similarity
    alike, similarities = zip(*found.values(), strict=True) if found else ((), ())
    return Near(
        np.array(list(found), np.int64),
        np.array(alike, np.int64),
        np.array(similarities, np.float32),
    )


def correlate(one: np.ndarray | None, other: np.ndarray | None, *, mirrored: bool) -> float:
    """The highest correlation of two pictures, by their windows; 0 where one is flat."""
    if one is None or other is None:
        return 0.0
    # Row 0 is the whole picture.
    best = max((one @ other[0]).max(), (other @ one[0]).max())
    if mirrored:
        best = max(best, (one @ _mirror(other[0])).max(), (other @ _mirror(one[0])).max())
    return float(best)


def cut_windows(thumbnail: np.ndarray) -> np.ndarray | None:
    """All windows of a picture, float32 [84, 256], of mean 0 and length 1; None if it is flat.

    A window without contrast is 0.
    """
    greys = thumbnail.reshape(SIDE, SIDE).astype(np.float32)
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


def _mirror(cells: np.ndarray) -> np.ndarray:
    return cells.reshape(_CELLS, _CELLS)[:, ::-1].ravel()


@functools.cache
def _averages() -> list[np.ndarray]:
    """Windows along a side by size: float32 [windows * _CELLS, SIDE], means of cells."""
    found = []
    for size in _SIZES:
        count = round((1 - size) / _STEP) + 1
        rows = [_average_cells(number * _STEP, size) for number in range(count)]
        found.append(np.concatenate(rows).astype(np.float32))
    return found


def _average_cells(start: float, size: float) -> np.ndarray:
    """Weights of the pixels in the cells of a window, float [_CELLS, SIDE]."""
    edges = (start + size * np.arange(_CELLS + 1) / _CELLS) * SIDE
    pixels = np.arange(SIDE)
    shared = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(shared, 0) * (_CELLS / (size * SIDE))
