"""Image transforms: encoded bytes -> RGB images -> square uint8 arrays, and normalisation.

Bytes come from the web: no content may crash a worker, and every rejection has a reason that can be
counted. Only NumPy and Pillow are used, so workers start fast. Batches are uint8, a quarter of the
bytes to copy to the device, where `normalize` runs inside the jitted step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# 8192 x 8192, 200 MB of pixels; larger than any useful photo of web data sets.
MAX_PIXELS = 2**26
REASONS = ("empty", "unreadable", "too_large")

# Image formats only; Pillow also opens documents (EPS, through Ghostscript) and exotic containers.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Modes whose conversion to RGB cannot fail after decoding.
_PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
_WHITE = (255, 255, 255)

# CLIP's statistics (arXiv 2103.00020), per channel, for values in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Images that would be larger once scaled are cropped first; 100 MB of pixels.
_MAX_SCALED_PIXELS = 2**25
_CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)  # range of width / height of training crops

RESIZES = ("crop", "squash")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
INTERPOLATIONS = tuple(_FILTERS)

Image.init()
_KNOWN_FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)


class ImageError(ValueError):
    """Bytes are not a usable image; `reason` is one of `REASONS`, for counting.

    Pillow's error is in the message but not the cause of this error. Most of Pillow's errors are
    `OSError`s, which would end a run like a failing disk, to be restarted.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes bytes to an upright 8-bit RGB image on a white background.

    Transparency (alpha channel, palette entry or colour key) is composed on white, EXIF
    orientation is applied, 16-bit grey is scaled to 8 bits, and CMYK (with Adobe's inversion) is
    converted. Animations become their first frame. Colour profiles are not applied.

    Args:
        data: an encoded image.
        max_pixels: largest width times height to decode; checked in the header, before memory for
            pixels is allocated.

    Raises:
        ImageError: reason "empty" (no bytes), "too_large" (more than `max_pixels`) or
            "unreadable" (no known format, truncated, corrupt, or pixels without a fixed range).
    """
    return load_rgb(open_image(data, max_pixels=max_pixels))


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Opens an image for `load_rgb` by its header (format, mode, size, EXIF); same errors."""
    if not data:
        raise ImageError("empty", "the image has no bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_KNOWN_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_large", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly any type on hostile bytes.
        raise ImageError(
            "unreadable", f"no picture in {len(data)} bytes ({_describe(error)})"
        ) from None
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            "too_large", f"{width} x {height} pixels; at most {max_pixels} are decoded"
        )
    return image


def load_rgb(image: Image.Image) -> Image.Image:
    """Decodes an image from `open_image` like `decode_rgb`, with the same errors."""
    _load_pixels(image)
    # With a broken EXIF block, the image is used as it is stored.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    try:
        if image.mode.startswith("I;16") or image.mode == "I":
            return _scale_sixteen_bits(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no fixed range")
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            canvas = Image.new("RGB", rgba.size, _WHITE)
            canvas.paste(rgba, mask=rgba.getchannel("A"))
            return canvas
        return image.convert("RGB")
    except (ValueError, OSError) as error:
        raise ImageError(
            "unreadable", f"cannot convert {image.format} mode {image.mode} to RGB ({error})"
        ) from None


def encode(image: Image.Image, form: str, **options: Any) -> bytes:
    """Encodes an image in a Pillow format, such as "PNG", with options of the format."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def check_readable(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[str, int, int]:
    """Checks that bytes can be decoded, with the errors of `decode_rgb`.

    JPEG is decoded at an eighth of its size, in less than half of the time. The whole stream is
    still read, so truncation is detected.

    Returns:
        Format ("JPEG", "PNG", ...), and width and height in pixels as stored, before any EXIF
        rotation.
    """
    image = open_image(data, max_pixels=max_pixels)
    name = "JPEG" if image.format == "MPO" else str(image.format)
    width, height = image.size
    if name == "JPEG":
        image.draft(None, (1, 1))
    _load_pixels(image)
    if image.mode not in _PLAIN_MODES:
        load_rgb(image)
    return name, width, height


def _load_pixels(image: Image.Image) -> None:
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:
        raise ImageError(
            "unreadable", f"cannot decode the {image.format} image ({_describe(error)})"
        ) from None


def _scale_sixteen_bits(image: Image.Image) -> Image.Image:
    # Mode "I" is 32-bit; PNG and PPM use it (or did, in older Pillow) for 16-bit grey only.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("32-bit integer pixels have no fixed range")
    values = np.asarray(image).astype(np.int64)
    grey = ((values * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Image preprocessing of a model; the default is CLIP's."""

    mean: tuple[float, float, float] = CLIP_MEAN  # per channel, for values in [0, 1]
    std: tuple[float, float, float] = CLIP_STD  # per channel, for values in [0, 1]
    # "crop" scales the short side and crops the centre; "squash" scales both sides, and keeps the
    # whole image but not its aspect ratio.
    resize: str = "crop"
    interpolation: str = "bicubic"  # "bicubic" or "bilinear", both antialiased

    def __post_init__(self):
        for name, known in (("resize", RESIZES), ("interpolation", INTERPOLATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}='{getattr(self, name)}': expected {' or '.join(known)}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"{name}={values}: expected three numbers, one for each channel")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std}: expected positive numbers")


def eval_transform(
    image: Image.Image, size: int, preprocessing: Preprocessing = Preprocessing()
) -> np.ndarray:
    """Resizes an image to a square, by scaling and cropping or by squashing.

    Equal to torchvision's `Resize(size)` and `CenterCrop(size)`, or `Resize((size, size))`, on
    Pillow images. Ours: if an image is hundreds of times longer than wide, only its centre is
    scaled.

    Args:
        image: mode "RGB", any size.
        size: side of the result, in pixels.
        preprocessing: how to resize; mean and deviation are for `normalize`.

    Returns:
        uint8 [size, size, 3], writable.

    Raises:
        ValueError: `image` is not an RGB image.
    """
    _check_picture(image)
    if preprocessing.resize == "squash":
        box = (0, 0, image.width, image.height)
        return crop_to_square(image, box, size, preprocessing.interpolation)
    if size**2 * max(image.size) / min(image.size) > _MAX_SCALED_PIXELS:
        # The centre of a long image, sixteen times as long as wide.
        left, top = (max(0, (side - 16 * min(image.size)) // 2) for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    width, height = image.size
    if width <= height:
        scaled_width, scaled_height = size, int(size * height / width)
    else:
        scaled_width, scaled_height = int(size * width / height), size
    # Python rounds half to even, like torchvision's centre crop.
    left = round((scaled_width - size) / 2)
    top = round((scaled_height - size) / 2)
    scaled = image.resize((scaled_width, scaled_height), _FILTERS[preprocessing.interpolation])
    return np.array(scaled.crop((left, top, left + size, top + size)))


def train_transform(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = CROP_RATIO,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Draws a random crop and scales it to a square (antialiased).

    `scale` is the range of the crop's fraction of the image area, and `ratio` that of its width /
    height. Other arguments, result and errors are those of `eval_transform`.
    """
    _check_picture(image)
    box = sample_crop_box(*image.size, rng, scale, ratio)
    return crop_to_square(image, box, size, interpolation)


def crop_to_square(
    image: Image.Image,
    box: tuple[int, int, int, int],
    size: int,
    interpolation: str = "bicubic",
) -> np.ndarray:
    """Crops an RGB image and scales it (antialiased) to uint8 [size, size, 3], writable.

    Equal to torchvision's `resized_crop` on Pillow images. `box` is left, top, right, bottom in
    pixels, inside the image.
    """
    return np.array(image.crop(box).resize((size, size), _FILTERS[interpolation]))


def sample_crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws the crop box of `RandomResizedCrop`, by torchvision's algorithm.

    The area is uniform and the aspect ratio log-uniform. After ten draws that do not fit, the
    result is the largest centre crop with an allowed ratio. Width and height are those of the
    image, in pixels; for the ranges see `train_transform`.

    Returns:
        left, top, right, bottom in pixels, inside the image.

    Raises:
        ValueError: a range is invalid.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < low <= high <= 1, got {tuple(scale)}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio: expected 0 < low <= high, got {tuple(ratio)}")
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_CROP_TRIES):
        # Equal to `rng.uniform`, in a fifth of the time.
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * rng.random())
        crop_width = round(math.sqrt(area * aspect))
        crop_height = round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(height - crop_height + 1))
            left = int(rng.integers(width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def normalize(
    images: Any,
    dtype: Any = np.float32,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Any:
    """Normalises a uint8 batch (by default like CLIP), for use inside a jitted function.

    Returns:
        (images / 255 - mean) / std for a JAX or NumPy array uint8 [..., 3], in float32 arithmetic;
        `mean` and `std` are per channel, for values in [0, 1].

    Raises:
        ValueError: `images` are not uint8, or the last axis is not three channels.
    """
    if images.dtype != np.uint8 or images.shape[-1:] != (3,):
        raise ValueError(
            "images: expected uint8 [..., 3] as the transforms give it, got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    deviation = np.asarray(std, np.float64)
    factor = (1 / (255 * deviation)).astype(np.float32)
    offset = (np.asarray(mean, np.float64) / deviation).astype(np.float32)
    return (images.astype(np.float32) * factor - offset).astype(dtype)


def _check_picture(image: Image.Image) -> None:
    if not isinstance(image, Image.Image) or image.mode != "RGB" or 0 in image.size:
        got = f"{image.mode} {image.size}" if isinstance(image, Image.Image) else type(image)
        raise ValueError(
            f"image: expected a Pillow image of mode 'RGB' with pixels, got {got}; diht_jax.input."
            "transforms.decode_rgb makes one from bytes, image.convert('RGB') from another mode"
        )
