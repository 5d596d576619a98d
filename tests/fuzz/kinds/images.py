"""Encoded images: damaged, animated, giant, and bombs, in every supported format.

Three functions must agree on what is an image: `decode_rgb`, `check_readable` of the filter, and
`plan_random_crop` of training.
"""

from __future__ import annotations

import pathlib
import struct
import zlib

import numpy as np
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one
from PIL import Image

from diht_jax.input import examples, transforms
from tests.fuzz.damage import Draw, cut, damaged, flipped, noise, seeds
from tests.fuzz.framing import chunk, png
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require
from tests.make import encoded

_CROP = 16
_LOSSLESS = ("PNG", "BMP", "TIFF", "PPM", "WEBP lossless")
_FORMATS = (
    *_LOSSLESS,
    *("JPEG", "JPEG progressive", "JPEG grey", "JPEG CMYK", "JPEG EXIF", "WEBP", "GIF"),
    *("PNG RGBA", "PNG palette", "PNG 16-bit", "PNG 1-bit", "TIFF LZW", "TIFF JPEG", "AVIF"),
    *("JPEG2000", "animated GIF", "animated WEBP", "animated PNG", "TIFF pages", "MPO"),
)
_MODES = {"grey": "L", "palette": "P", "1-bit": "1"}
# Unusual pixel modes, which may be refused.
_ODD = ("TIFF LAB", "TIFF I", "TIFF F", "TIFF 1", "TIFF RGBA", "PNG LA", "BMP P", "JPEG YCbCr")


@st.composite
def _pixels(draw: Draw) -> np.ndarray:
    """Returns uint8 [h, w, 3], smooth enough for JPEG but not flat."""
    size = draw(st.tuples(integers(1, 60), integers(1, 60)))
    coarse = np.random.default_rng(draw(seeds)).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


@st.composite
def _encoded(draw: Draw, name: str, array: np.ndarray) -> bytes:
    """Encodes the pixels in a format of `_FORMATS`."""
    format, _, form = name.partition(" ")
    image = Image.fromarray(array)
    options: dict = {}
    if format == "animated":
        format, others = form, [Image.fromarray(np.roll(array, n, 1)) for n in (1, 2)]
        options = {"save_all": True, "append_images": others}
    elif form == "pages" or format == "MPO":
        options = {"save_all": True, "append_images": [image, image]}
    elif form in ("lossless", "progressive"):
        options = {form: True}
    elif form == "EXIF":
        options = {"exif": _exif(draw(integers(0, 9)))}
    elif form in ("LZW", "JPEG"):
        options = {"compression": {"LZW": "tiff_lzw", "JPEG": "jpeg"}[form]}
    elif form == "16-bit":
        image = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    elif form:
        image = image.convert(_MODES.get(form, form))
    return encoded(image, format, **options)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif.update({0x0112: orientation, 0x010E: "text"})
    return exif


def _judge(data: bytes, must: str | None = None) -> str:
    """Decodes in all three ways; `must` is the reason for which the image must be refused."""
    decoded = attempt(lambda: transforms.decode_rgb(data), "")
    readable = attempt(lambda: transforms.check_readable(data), "")
    rng = np.random.default_rng(0)
    crop = attempt(lambda: examples.plan_random_crop(data, _CROP, rng)(), "")
    refused = isinstance(decoded, Refused)
    require(refused == isinstance(readable, Refused), f"decode {decoded}, check {readable}")
    require(refused == isinstance(crop, Refused), f"decode {decoded}, crop {crop!r:.200}")
    if refused:
        require(decoded.reason in transforms.REASONS, f"no reason: {decoded}")
        require(must in (None, decoded.reason), f"expected '{must}', got {decoded}")
        return ERROR
    require(must is None, f"a picture of {decoded.size}, where '{must}' was expected")
    require(decoded.mode == "RGB", f"mode {decoded.mode}")
    require(decoded.width * decoded.height <= transforms.MAX_PIXELS, f"size {decoded.size}")
    require(set(readable[1:]) == set(decoded.size), f"sizes {readable} and {decoded.size}")
    require(crop.shape == (_CROP, _CROP, 3) and crop.dtype == np.uint8, f"crop {crop.shape}")
    return SUCCESS


def check_undisturbed(draw: Draw, folder: pathlib.Path) -> str:
    """Every format is read, the lossless formats exactly."""
    name, array = draw(one(_FORMATS)), draw(_pixels())
    data = draw(_encoded(name, array))
    require(_judge(data) == SUCCESS, f"a good {name} was refused")
    same = name not in _LOSSLESS or np.array_equal(np.asarray(transforms.decode_rgb(data)), array)
    require(same, f"the pixels of a {name} have changed")
    return SUCCESS


def check_damaged(draw: Draw, folder: pathlib.Path) -> str:
    """Odd modes, wrong sizes, flipped bits, truncation, and other damage."""
    data = draw(_encoded(draw(one(_FORMATS + _ODD)), draw(_pixels())))
    size = draw(one([16, 40, 100]))
    head = flipped(data[:size], 4).map(lambda head: head + data[size:])
    resized = st.just(_jpeg_with_size(draw, draw(one([65, 500, 3000]))))
    whole = st.just(data)
    return _judge(draw(whole | resized | flipped(data) | head | cut(data) | damaged(data)))


def check_giant(draw: Draw, folder: pathlib.Path) -> str:
    """A header that claims more pixels than the limit allocates no memory."""
    side = draw(one([8193, 20_000, 2**16 - 1]))
    wide = draw(one([8193, 10**6, 2**31 - 1]))
    gif = struct.pack("<HHBBB", side, side, 0, 0, 0) + b","
    gif += struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\2\2\x44\1\0;"
    bmp = struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, wide, -wide, 1, 24, *[0] * 6)
    data = [png(wide, wide, zlib.compress(b"")), png(2**26 + 1, 1, zlib.compress(b""))]
    data += [b"GIF89a" + gif, b"BM" + bmp, b"P6\n%d %d\n255\n" % (wide, wide)]
    return _judge(draw(one([*data, _jpeg_with_size(draw, side)])), "too_large")


def _jpeg_with_size(draw: Draw, side: int) -> bytes:
    data = bytearray(draw(_encoded("JPEG", draw(_pixels()))))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def check_bomb(draw: Draw, folder: pathlib.Path) -> str:
    """A few kilobytes decompress to many megabytes."""
    zeros, small = zlib.compress(bytes(2**24), 1), zlib.compress(b"\0\1\2\3")
    side = draw(one([1000, 3000]))
    rows = zlib.compress(bytes(side * (side // 8 + 1)))
    chunks = [
        [chunk(b"zTXt", b"Comment\0\0" + zeros)] * 9,
        [chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros)] * 9,
        [chunk(b"iCCP", b"x\0\0" + zeros)],
        [chunk(b"tEXt", b"a\0" + bytes(2**20))],
        [chunk(b"tRNS", b"\0\0\0\0\0\0")] * 5,
    ]
    data = [png(side, side, rows, depth=1, colour_type=0), png(1, 1, zeros)]
    return _judge(draw(one([*data, *(png(1, 1, small, *extra) for extra in chunks)])))


def check_tiff_tags(draw: Draw, folder: pathlib.Path) -> str:
    """Directories that point at themselves or nowhere, and counts and sizes of gigabytes."""
    size = draw(one([1, 40]))
    tags = {256: (4, 1, size), 257: (4, 1, size), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    tags |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, size), 279: (4, 1, size * size)}
    tag = draw(one(list(tags)))
    kind, count, _ = tags[tag]
    odd = [(kind, 2**32 - 1, 8), *((kind, count, n) for n in (0, 2**31, 2**32 - 1, 65535))]
    odd += [(k, n, 8) for k in (0, 2, 5, 7, 12, 13, 99) for n in (1, 3, 2**20)]
    tags[tag] = draw(one(odd))
    entries = b"".join(struct.pack("<HHII", t, *v) for t, v in sorted(tags.items()))
    offset = 8 + size * size
    following = draw(one([0, offset, 8, 2**32 - 1]))
    data = b"II*\0" + struct.pack("<I", offset) + draw(noise(size * size, size * size))
    data += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return _judge(data)
