"""Encoded images: damaged, animated, giant, and bombs, in every format that is decoded.

The three ways in (`decode_rgb`, `check_readable` for the filter, `decode_random_crop` for training)
must agree on what is a picture.
"""

from __future__ import annotations

import io
import pathlib
import struct
import zlib

import numpy as np
from PIL import Image

from diht_jax.data.images import decode, fast_crops
from tests.fuzz.cases import ERROR, SUCCESS, Draw, Refused, attempt, require

_CROP = 16
_LOSSLESS = ("PNG", "BMP", "TIFF", "PPM", "WEBP lossless")
_FORMATS = (
    *_LOSSLESS,
    *("JPEG", "JPEG progressive", "JPEG grey", "JPEG CMYK", "JPEG EXIF", "WEBP", "GIF"),
    *("PNG RGBA", "PNG palette", "PNG 16-bit", "PNG 1-bit", "TIFF LZW", "TIFF JPEG", "AVIF"),
    *("JPEG2000", "animated GIF", "animated WEBP", "animated PNG", "TIFF pages", "MPO"),
)


def pixels(draw: Draw) -> np.ndarray:
    """uint8 [h, w, 3], smooth enough for JPEG and not flat."""
    height, width = draw.randint(1, 60), draw.randint(1, 60)
    rng = np.random.default_rng(draw.randrange(2**32))
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(draw: Draw, name: str, array: np.ndarray) -> bytes:
    """The pixels in a format of `_FORMATS`."""
    format, _, form = name.partition(" ")
    image = Image.fromarray(array)
    options: dict = {}
    if format == "animated":
        format, others = form, [Image.fromarray(np.roll(array, n, 1)) for n in (1, 2)]
        options = {"save_all": True, "append_images": others}
    elif form == "pages":
        options = {"save_all": True, "append_images": [image, image]}
    elif form in ("lossless", "progressive"):
        options = {form: True}
    elif form == "EXIF":
        exif = Image.Exif()
        exif[0x0112] = draw.randint(0, 9)
        options = {"exif": exif}
    elif form in ("LZW", "JPEG"):
        options = {"compression": {"LZW": "tiff_lzw", "JPEG": "jpeg"}[form]}
    elif form == "16-bit":
        image = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    elif form:
        image = image.convert({"grey": "L", "palette": "P", "1-bit": "1"}.get(form, form))
    if format == "MPO":
        options = {"save_all": True, "append_images": [image]}
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def judge(data: bytes, must: str | None = None) -> str:
    """Decodes in all three ways.

    Args:
        data: maybe an image.
        must: the reason for which it must be refused.
    """
    decoded = attempt(lambda: decode.decode_rgb(data), "")
    readable = attempt(lambda: decode.check_readable(data), "")
    rng = np.random.default_rng(0)
    crop = attempt(lambda: fast_crops.decode_random_crop(data, _CROP, rng), "")
    refused = isinstance(decoded, Refused)
    require(refused == isinstance(readable, Refused), f"decode {decoded}, check {readable}")
    require(refused == isinstance(crop, Refused), f"decode {decoded}, crop {crop!r:.200}")
    if refused:
        error = None
        try:
            decode.decode_rgb(data)
        except decode.ImageError as caught:
            error = caught
        require(error is not None and error.reason in decode.REASONS, f"no reason: {error!r}")
        require(must in (None, error.reason), f"expected '{must}', got '{error.reason}': {error}")
        return ERROR
    require(must is None, f"a picture of {decoded.size}, where '{must}' was expected")
    require(decoded.mode == "RGB", f"mode {decoded.mode}")
    require(decoded.width * decoded.height <= decode.MAX_PIXELS, f"size {decoded.size}")
    require(set(readable[1:]) == set(decoded.size), f"sizes {readable} and {decoded.size}")
    require(crop.shape == (_CROP, _CROP, 3) and crop.dtype == np.uint8, f"crop {crop.shape}")
    return SUCCESS


def _undisturbed(draw: Draw, folder: pathlib.Path) -> str:
    array, name = pixels(draw), _FORMATS[draw.number // len(MUTATIONS) % len(_FORMATS)]
    data = encode(draw, name, array)
    outcome = judge(data)
    require(outcome == SUCCESS, f"a good {name} was refused")
    if name in _LOSSLESS:
        same = np.array_equal(np.asarray(decode.decode_rgb(data)), array)
        require(same, f"the pixels of a {name} have changed")
    return outcome


def _any_image(draw: Draw) -> bytes:
    return encode(draw, draw.choice(_FORMATS), pixels(draw))


def _bits_flipped(draw: Draw, folder: pathlib.Path) -> str:
    return judge(draw.flip(_any_image(draw)))


def _bits_flipped_in_front(draw: Draw, folder: pathlib.Path) -> str:
    data = _any_image(draw)
    size = draw.choice([16, 40, 100])
    return judge(draw.flip(data[:size], 4) + data[size:])


def _cut_off(draw: Draw, folder: pathlib.Path) -> str:
    return judge(draw.cut(_any_image(draw)))


def _damaged(draw: Draw, folder: pathlib.Path) -> str:
    return judge(draw.damage(_any_image(draw)))


def _empty(draw: Draw, folder: pathlib.Path) -> str:
    return judge(b"", "empty")


def _no_image(draw: Draw, folder: pathlib.Path) -> str:
    """Documents, programs, texts; Pillow would open some of them with other programs."""
    texts = [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n", b"<svg/>"]
    texts += [b"<html>", b"\x7fELF" + bytes(99), b"MZ" + bytes(99), b"PK\3\4", draw.randbytes(99)]
    texts += [bytes(1000), b"\n", b"{}", b"BM", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a"]
    texts += [b"RIFF\x10\0\0\0WEBPVP8 ", b"II*\0\x08\0\0\0", b"P6\n3 3\n255\n"]
    return judge(draw.choice(texts), "unreadable")


def _png(width: int, height: int, body: bytes, *extra: bytes, depth: int = 8, kind: int = 2):
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    chunks = [_chunk(b"IHDR", header), *extra, _chunk(b"IDAT", body), _chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _giant(draw: Draw, folder: pathlib.Path) -> str:
    """Headers that claim more pixels than may be decoded; none may be taken memory for."""
    side = draw.choice([8193, 20_000, 2**16 - 1])
    wide = draw.choice([8193, 10**6, 2**31 - 1])
    data = draw.choice(
        [
            _png(wide, wide, zlib.compress(b"")),
            _png(2**26 + 1, 1, zlib.compress(b"")),
            b"GIF89a"
            + struct.pack("<HHBBB", side, side, 0, 0, 0)
            + b","
            + struct.pack("<HHHHB", 0, 0, side, side, 0)
            + b"\2\2\x44\1\0;",
            b"BM"
            + struct.pack("<IHHI", 54, 0, 0, 54)
            + struct.pack("<IiiHHIIiiII", 40, wide, -wide, 1, 24, 0, 0, 0, 0, 0, 0),
            b"P6\n%d %d\n255\n" % (wide, wide),
            _jpeg_with_size(draw, side),
        ]
    )
    return judge(data, "too_large")


def _jpeg_with_size(draw: Draw, side: int) -> bytes:
    data = bytearray(encode(draw, "JPEG", pixels(draw)))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", side, side)
    return bytes(data)


def _large_for_its_header(draw: Draw, folder: pathlib.Path) -> str:
    """A JPEG that claims a larger picture than it has, below the limit."""
    return judge(_jpeg_with_size(draw, draw.choice([65, 500, 3000])))


def _bomb(draw: Draw, folder: pathlib.Path) -> str:
    """A few kilobytes that become many megabytes."""
    zeros = zlib.compress(bytes(2**24), 9)
    side = draw.choice([1000, 3000])
    text = _chunk(b"zTXt", b"Comment\0\0" + zeros)
    profile = _chunk(b"iCCP", b"x\0\0" + zeros)
    long_text = _chunk(b"iTXt", b"Comment\0\1\0\0\0" + zeros)
    small = zlib.compress(b"\0\1\2\3")
    data = draw.choice(
        [
            _png(side, side, zlib.compress(bytes(side * (side // 8 + 1))), depth=1, kind=0),
            _png(1, 1, small, *[draw.choice([text, long_text])] * 9),
            _png(1, 1, small, profile),
            _png(1, 1, small, _chunk(b"tEXt", b"a\0" + bytes(2**20))),
            _png(1, 1, zeros),
            _png(1, 1, small, *[_chunk(b"tRNS", b"\0\0\0\0\0\0")] * 5),
        ]
    )
    return judge(data)


def _many_frames(draw: Draw, folder: pathlib.Path) -> str:
    """Of an animation the first frame is taken, however many there are and however broken."""
    array = pixels(draw)
    frames = [Image.fromarray(np.roll(array, n, 0)) for n in range(30)]
    buffer = io.BytesIO()
    frames[0].save(
        buffer, draw.choice(["GIF", "WEBP", "PNG", "TIFF"]), save_all=True, append_images=frames[1:]
    )
    data = buffer.getvalue()
    if draw.random() < 0.5:
        place = draw.randrange(len(data) // 2, len(data))
        data = data[:place] + draw.flip(data[place:])
    return judge(data)


def _tiff(draw: Draw, folder: pathlib.Path) -> str:
    """Directories that point at themselves or nowhere, counts and sizes of gigabytes."""
    size = draw.choice([1, 40])
    tags = {256: (4, 1, size), 257: (4, 1, size), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1)}
    tags |= {273: (4, 1, 8), 277: (3, 1, 1), 278: (4, 1, size), 279: (4, 1, size * size)}
    tag = draw.choice(list(tags))
    kind, count, _ = tags[tag]
    tags[tag] = draw.choice(
        [
            (kind, 2**32 - 1, 8),
            (kind, count, draw.choice([0, 2**31, 2**32 - 1, 65535])),
            (draw.choice([0, 2, 5, 7, 12, 13, 99]), draw.choice([1, 3, 2**20]), 8),
        ]
    )
    entries = b"".join(struct.pack("<HHII", t, *v) for t, v in sorted(tags.items()))
    offset = 8 + size * size
    following = draw.choice([0, offset, 8, 2**32 - 1])
    data = b"II*\0" + struct.pack("<I", offset) + draw.randbytes(size * size)
    data += struct.pack("<H", len(tags)) + entries + struct.pack("<I", following)
    return judge(data)


def _exif(draw: Draw, folder: pathlib.Path) -> str:
    """A picture is shown as it lies where its EXIF block is broken: it is no reason to lose it."""
    array = pixels(draw)
    exif = Image.Exif()
    exif[0x0112] = draw.randint(1, 8)
    exif[0x010E] = "text"
    block = draw.damage(exif.tobytes())[:60_000]
    buffer = io.BytesIO()
    format = draw.choice(["JPEG", "PNG", "WEBP"])
    Image.fromarray(array).save(buffer, format, exif=block)
    outcome = judge(buffer.getvalue())
    require(outcome == SUCCESS, "a good picture is lost for its EXIF block")
    return outcome


def _odd_modes(draw: Draw, folder: pathlib.Path) -> str:
    """Pixels that are no eight-bit colours."""
    rng = np.random.default_rng(draw.randrange(2**32))
    modes = [("I", "TIFF"), ("F", "TIFF"), ("I;16", "TIFF"), ("LAB", "TIFF"), ("YCbCr", "JPEG")]
    modes += [("LA", "PNG"), ("CMYK", "TIFF"), ("1", "TIFF"), ("RGBA", "TIFF"), ("P", "BMP")]
    mode, format = draw.choice(modes)
    image = Image.fromarray(rng.integers(0, 255, (9, 7), dtype=np.uint8))
    image = (
        image.convert("RGB").convert(mode)
        if mode not in ("I", "F", "I;16")
        else (
            Image.fromarray(
                rng.integers(0, 2**15, (9, 7)).astype(
                    {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
                )
            )
        )
    )
    buffer = io.BytesIO()
    image.save(buffer, format)
    return judge(buffer.getvalue())


MUTATIONS = {
    "undisturbed": _undisturbed,
    "bits flipped": _bits_flipped,
    "bits flipped in front": _bits_flipped_in_front,
    "cut off": _cut_off,
    "damaged": _damaged,
    "empty": _empty,
    "no image": _no_image,
    "giant": _giant,
    "larger than it is": _large_for_its_header,
    "bomb": _bomb,
    "many frames": _many_frames,
    "tiff tags": _tiff,
    "broken exif": _exif,
    "odd modes": _odd_modes,
}
