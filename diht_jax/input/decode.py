"""Encoded image bytes -> an RGB picture as a viewer would show it.

Bytes come from the web: nothing that they hold may crash a worker, and every refusal has a reason
that can be counted. Cropping, scaling and normalisation belong in `transforms.py`.
"""

from __future__ import annotations

import contextlib
import io

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
    return _to_rgb(image)


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
        _to_rgb(image)
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


def _to_rgb(image: Image.Image) -> Image.Image:
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
