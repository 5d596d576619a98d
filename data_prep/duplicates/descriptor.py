"""A picture as 96 numbers that survive another size, another encoding and small crops.

Ours, and simple on purpose: lightness at 8 x 8 and both colour differences at 4 x 4, lightness
without its mean. It knows nothing of what a picture shows, so it finds copies that were edited and
not other pictures of the same thing; for those take embeddings of a model.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_prep.duplicates.crop_match import SIDE
from diht_jax.input.decode import load_rgb, open_image

# Raised whenever equal pictures come to have other numbers.
VERSION = 1

_SIDE = 64  # px at which cells are averaged
_CELLS, _COLOR_CELLS = 8, 4
_LEAST_COLOR = 100.0  # grey pictures have no colour to be compared by: noise is not scaled up
_COLOR_WEIGHT = 0.5


def describe_picture(
    data: bytes, *, mirrored: bool, max_pixels: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """The descriptor of an encoded picture.

    Args:
        data: the encoded picture.
        mirrored: a picture and its mirror image get the same numbers.
        max_pixels: of a picture that is decoded.

    Returns:
        float32 [96] of length 1, or 0 for a picture of one grey; the greys of `shrink_picture`;
        width and height.

    Raises:
        ImageError: no picture.
    """
    channels, size = _decode_small(data, max_pixels)
    light = _average(channels[..., 0], _CELLS)
    light -= light.mean()
    light /= max(float(np.linalg.norm(light)), 1e-6)
    colors = [_average(channels[..., i], _COLOR_CELLS) - 128 for i in (1, 2)]
    parts = [_fold(part) if mirrored else part.ravel() for part in (light, *colors)]
    color = np.concatenate(parts[1:])
    color *= _COLOR_WEIGHT / max(float(np.linalg.norm(color)), _LEAST_COLOR)
    found = np.concatenate([parts[0], color])
    return found / max(float(np.linalg.norm(found)), 1e-6), _shrink(channels), size


def shrink_picture(data: bytes, *, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """The greys of an encoded picture at 32 x 32, uint8, and its width and height.

    Raises:
        ImageError: no picture.
    """
    channels, size = _decode_small(data, max_pixels)
    return _shrink(channels), size


def _decode_small(data: bytes, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Lightness and two colour differences, float32 [64, 64, 3], and the size of the picture."""
    image = open_image(data, max_pixels=max_pixels)
    size = image.size
    if image.format == "JPEG":
        image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # decoded at a fraction of its size
    image = load_rgb(image).convert("YCbCr").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32), size


def _shrink(channels: np.ndarray) -> np.ndarray:
    return np.round(_average(channels[..., 0], SIDE)).astype(np.uint8)


def _average(channel: np.ndarray, cells: int) -> np.ndarray:
    """[64, 64] -> means [cells, cells]."""
    return channel.reshape(cells, _SIDE // cells, cells, _SIDE // cells).mean((1, 3))


def _fold(grid: np.ndarray) -> np.ndarray:
    """Sum of the grid and its mirror image, and the size of their difference; length is kept."""
    half = grid.shape[1] // 2
    left, right = grid[:, :half], grid[:, ::-1][:, :half]
    return np.concatenate([(left + right).ravel(), np.abs(left - right).ravel()]) / np.sqrt(2)
