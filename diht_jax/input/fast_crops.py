"""Encoded image bytes -> the random crop of training, in less than half of the exact way's time.

Evaluation decodes with `decode.py` and scales with `transforms.eval_transform` instead.
Ordinary JPEG files (8 bits, colour or grey, upright) are decoded by libjpeg-turbo straight into an
array, at a half, a quarter or an eighth of their size where the crop has pixels to spare, and
scaled by cykooz-resizer, whose filter is Pillow's in vector code. Everything else, and every file
that the decoder warns about, goes the exact way, which also decides on errors: what is
refused there is refused here, with the same words.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from diht_jax.input import decode, transforms

try:
    import cykooz_resizer
except ImportError:  # it has no wheels for Linux on ARM
    cykooz_resizer = None

# The crop keeps at least this many pixels for each one of the result: a decoder that reduces has a
# filter of its own, whose difference from Pillow's then hardly shows.
_MIN_OVERSAMPLING = 1.25
_REDUCTIONS = (8, 4, 2)  # those for which libjpeg-turbo has vector code

_EXIF_OR_XMP = b"\xff\xe1"  # the marker of what may turn a picture; compressed pixels lack it
_PLAIN_COLORSPACES = ("YCbCr", "RGB", "Gray")

# A thread does not keep the memory of larger pictures.
_MOST_KEPT_BYTES = 2**24

# A resizer keeps buffers, so each thread has its own.
_kept = threading.local()


def plan_random_crop(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
) -> Callable[[], np.ndarray]:
    """Draws a random crop; what is returned decodes it, scaled to a square.

    The crop is the one that `transforms.train_transform` would draw; of a reduced picture its edges
    are rounded to whole reduced pixels, which moves them by less than one pixel of the result.

    Only an ordinary JPEG file waits; another picture is decoded here, since it may take much more
    memory than its crop. Either call may raise `ImageError` or, for a wrong range, ValueError.

    Args:
        data: an encoded image.
        size: pixels, of both sides of the result.
        rng: decides the crop.
        scale: range of the crop's share of the picture's area.
        ratio: range of the crop's width / height.
        interpolation: of `transforms.Preprocessing`.

    Returns:
        A function that gives uint8 [size, size, 3], possibly read-only; the same for the same
        arguments.
    """
    image_size = _size_of_plain_jpeg(data)
    if image_size is None:
        image = decode.open_image(data)
        if not _is_ordinary_jpeg(image):
            picture = decode.load_rgb(image)
            crop = transforms.train_transform(picture, size, rng, scale, ratio, interpolation)
            return lambda: crop
        image_size = image.size
    box = transforms.sample_crop_box(*image_size, rng, scale, ratio)
    return functools.partial(_decode_crop, data, image_size, box, size, interpolation)


def _decode_crop(
    data: bytes,
    image_size: tuple[int, int],
    box: tuple[int, int, int, int],
    size: int,
    interpolation: str,
) -> np.ndarray:
    """A crop of an ordinary JPEG file."""
    reduction = choose_reduction(box, size)
    pixels = _decode_jpeg(data, image_size, reduction)
    if pixels is None:
        return transforms.crop_to_square(decode.decode_rgb(data), box, size, interpolation)
    left, top, right, bottom = (
        edge // reduction for edge in reduce_box(box, image_size, reduction)
    )
    return scale_to_square(pixels[top:bottom, left:right], size, interpolation)


def choose_reduction(box: tuple[int, int, int, int], size: int) -> int:
    """The factor (1, 2, 4 or 8) by which a picture may be decoded smaller for a crop."""
    left, top, right, bottom = box
    spare = min(right - left, bottom - top) / (size * _MIN_OVERSAMPLING)
    return next((reduction for reduction in _REDUCTIONS if reduction <= spare), 1)


def reduce_box(
    box: tuple[int, int, int, int], image_size: tuple[int, int], reduction: int
) -> tuple[int, int, int, int]:
    """The crop nearest to `box` whose edges are multiples of the reduction.

    What is left over at the right and bottom of a picture that the reduction does not divide makes
    no whole reduced pixel, and is left out.
    """
    limits = [side // reduction for side in image_size] * 2
    left, top, right, bottom = (
        min(round(edge / reduction), limit) * reduction
        for edge, limit in zip(box, limits, strict=True)
    )
    return left, top, right, bottom


def scale_to_square(pixels: np.ndarray, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Scales uint8 [h, w, 3] as `transforms.crop_to_square` does, up to the rounding of a pass."""
    if cykooz_resizer is None:
        box = (0, 0, pixels.shape[1], pixels.shape[0])
        return transforms.crop_to_square(Image.fromarray(pixels), box, size, interpolation)
    resizer, options = _resizer(interpolation)
    height, width = pixels.shape[:2]
    scaled = cykooz_resizer.ImageData(size, size, cykooz_resizer.PixelType.U8x3)
    whole = cykooz_resizer.ImageData(width, height, cykooz_resizer.PixelType.U8x3, pixels.tobytes())
    resizer.resize(whole, scaled, options)
    return np.frombuffer(scaled.get_buffer(), np.uint8).reshape(size, size, 3)  # a copy


def _resizer(interpolation: str) -> tuple[Any, Any]:
    """This thread's resizer, and the options of an antialiased filter."""
    assert cykooz_resizer is not None
    kept = vars(_kept).setdefault("resizers", {})
    if interpolation not in kept:
        # Pillow's BICUBIC is the cubic with a = -0.5, which is Catmull and Rom's.
        names = {"bicubic": "catmull_rom", "bilinear": "bilinear"}
        kind = getattr(cykooz_resizer.FilterType, names[interpolation])
        convolution = cykooz_resizer.ResizeAlg.convolution(kind)
        options = cykooz_resizer.ResizeOptions(resize_alg=convolution, use_alpha=False)
        kept[interpolation] = cykooz_resizer.Resizer(), options
    return kept[interpolation]


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG file without EXIF and XMP; None where Pillow has to look."""
    if _EXIF_OR_XMP in data:
        return None
    try:
        *sides, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    height, width = map(int, sides)
    is_plain = colorspace in _PLAIN_COLORSPACES and width * height <= decode.MAX_PIXELS
    return (width, height) if is_plain else None


def _is_ordinary_jpeg(image: Image.Image) -> bool:
    # MPO is JPEG with more pictures behind the first one.
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return False
    if "exif" not in image.info and "xmp" not in image.info:
        return True
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # Pillow raises nearly any type on broken EXIF.
        return False


def _decode_jpeg(data: bytes, image_size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """uint8 [ceil(h / reduction), ceil(w / reduction), 3], or None where anything is odd.

    It is valid until this thread decodes its next picture.
    """
    width, height = image_size
    reduced = (math.ceil(height / reduction), math.ceil(width / reduction))
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            min_height=reduced[0],
            min_width=reduced[1],
            min_factor=reduction,
            buffer=_pixel_buffer(3 * reduced[0] * reduced[1]),
        )
    except ValueError:  # also where another header asks for more than the buffer
        return None
    return pixels if pixels.shape[:2] == reduced else None


def _pixel_buffer(num_bytes: int) -> bytearray:
    """This thread's memory for decoded pixels, in which the caches still hold the last picture."""
    if num_bytes > _MOST_KEPT_BYTES:
        return bytearray(num_bytes)
    if len(getattr(_kept, "pixels", b"")) < num_bytes:
        _kept.pixels = bytearray(num_bytes)
    return _kept.pixels
