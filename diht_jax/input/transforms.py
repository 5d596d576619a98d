"""Encoded image bytes -> RGB pictures -> square uint8 arrays, and the normalisation on the device.

Bytes come from the web: nothing that they hold may crash a worker, and every refusal has a reason
that can be counted. NumPy and Pillow only, so that workers start fast. Batches stay uint8 up to the
device, where `normalize` runs inside the jitted step: a quarter of the bytes to copy.
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

# 8192 x 8192: 200 MB once decoded; larger than any photo of the web sets that is worth its time.
MAX_PIXELS = 2**26
REASONS = ("empty", "unreadable", "too_large")

# Pictures only: Pillow also opens documents (EPS, through Ghostscript) and exotic containers.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Modes whose conversion to RGB cannot fail once the pixels are there.
_PLAIN_MODES = ("1", "L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
_WHITE = (255, 255, 255)

# Of CLIP (arXiv 2103.00020), per channel, for values in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Above this, a picture is not scaled as a whole. 100 MB of pixels.
_MAX_SCALED_PIXELS = 2**25
_CROP_TRIES = 10
CROP_RATIO = (3 / 4, 4 / 3)  # of width and height, as everywhere in training

RESIZES = ("crop", "squash")
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
INTERPOLATIONS = tuple(_FILTERS)

Image.init()
_KNOWN_FORMATS = tuple(name for name in _FORMATS if name in Image.OPEN)


class ImageError(ValueError):
    """Bytes that are no picture we can use, with one of `REASONS` to be counted by.

    Pillow's own error is in the message and not its cause: most are of type `OSError`, by which a
    run would end as by a disk that fails, to be started again.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self):
        return type(self), (self.reason, str(self))


def decode_rgb(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes bytes to RGB: upright, on white, eight bits.

    Transparency (alpha channel, palette entry or colour key) is composed on white, EXIF
    orientation is applied, 16-bit grey is scaled to 8 bits, CMYK (with Adobe's inversion) is
    converted; of an animation the first frame is taken. Colour profiles are not applied.

    Args:
        data: an encoded image.
        max_pixels: width times height that is still decoded; checked in the header, before any
            memory is taken for pixels.

    Raises:
        ImageError: reason "empty" (no bytes), "too_large" (more than `max_pixels`) or
            "unreadable" (no known format, truncated, corrupt, or pixels without a fixed range).
    """
    return load_rgb(open_image(data, max_pixels=max_pixels))


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads the header only: format, mode, size and EXIF; for `load_rgb`, with its errors."""
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
    """The pixels of what `open_image` opened, as `decode_rgb` gives them; its errors, too."""
    _load_pixels(image)
    # A broken EXIF block does not concern the picture, which is shown as it is stored.
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
    """The bytes of a picture in a format of Pillow, such as "PNG", with the format's options."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def check_readable(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[str, int, int]:
    """Decodes bytes only to see whether that works; errors as `decode_rgb`.

    JPEG is decoded at an eighth of its size: the whole stream is still read, so that truncation
    is found, in less than half of the time.

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
    """Preprocessing of the pictures of a model, by default CLIP's."""

    mean: tuple[float, float, float] = CLIP_MEAN  # per channel, for values in [0, 1]
    std: tuple[float, float, float] = CLIP_STD  # likewise
    # "crop" scales the short side and crops the centre; "squash" scales both sides, and keeps all
    # of the picture but not its aspect ratio.
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
    """Makes a square of a picture: scaled and cropped, or squashed.

    Equal to torchvision's `Resize(size)` and `CenterCrop(size)`, or `Resize((size, size))`, on
    Pillow images. Ours: of a picture hundreds of times longer than wide, only the centre is scaled
    before it is cropped.

    Args:
        image: mode "RGB", any size.
        size: pixels, of both sides of the result.
        preprocessing: how it is resized; mean and deviation are for `normalize`.

    Returns:
        uint8 [size, size, 3], writable.

    Raises:
        ValueError: not an RGB picture.
    """
    _check_picture(image)
    if preprocessing.resize == "squash":
        box = (0, 0, image.width, image.height)
        return crop_to_square(image, box, size, preprocessing.interpolation)
    if size**2 * max(image.size) / min(image.size) > _MAX_SCALED_PIXELS:
        # The centre of a long picture, sixteen times as long as wide.
        left, top = (max(0, (side - 16 * min(image.size)) // 2) for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
    width, height = image.size
    if width <= height:
        scaled_width, scaled_height = size, int(size * height / width)
    else:
        scaled_width, scaled_height = int(size * width / height), size
    # Python's round, to even: torchvision's choice of the centre.
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
    """A random crop, scaled to a square (antialiased).

    `scale` is the range of the crop's share of the picture's area, `ratio` that of its width /
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
    """A part of an RGB picture, scaled to a square (antialiased): uint8 [size, size, 3], writable.

    Equal to torchvision's `resized_crop` on Pillow images. `box` is left, top, right, bottom in
    pixels, inside of the picture.
    """
    return np.array(image.crop(box).resize((size, size), _FILTERS[interpolation]))


def sample_crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """The crop of `RandomResizedCrop`, by torchvision's algorithm.

    The area is uniform and the aspect ratio log-uniform; a crop that does not fit is drawn again,
    ten times at most, and then the largest centre crop with an allowed ratio is taken. Width and
    height are the picture's, in pixels; for the ranges see `train_transform`.

    Returns:
        left, top, right, bottom in pixels, inside of the picture.

    Raises:
        ValueError: an invalid range.
    """
    if not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale: expected 0 < low <= high <= 1, got {tuple(scale)}")
    if not 0 < ratio[0] <= ratio[1] < math.inf:
        raise ValueError(f"ratio: expected 0 < low <= high, got {tuple(ratio)}")
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_CROP_TRIES):
        # What `rng.uniform` does, in a fifth of its time.
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
    """CLIP's normalisation of a uint8 batch, for use inside a jitted function.

    Returns:
        (images / 255 - mean) / std for uint8 [..., 3], a JAX or NumPy array, in float32 arithmetic;
        `mean` and `std` are per channel, for values in [0, 1].

    Raises:
        ValueError: not uint8, or no three channels at the end.
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
