"""Clip art of the Open Clip Art Library, with the titles that its artists gave.

Nobody has cleaned the titles: many are names of collections, names in other languages, or those of
the drawing that a file was copied from.
"""

from __future__ import annotations

import io
import pathlib
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, UnidentifiedImageError

from data_prep.example_data.archives import ExamplePair, read_archive, write_pair_tar
from data_prep.example_data.packages import Package

_ADDRESS = "https://deb.debian.org/debian/pool/main/o/openclipart"
DRAWINGS = Package(
    f"{_ADDRESS}/openclipart-png_0.18+dfsg-19_all.deb",
    "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    130_910_028,
)
TITLES = Package(
    f"{_ADDRESS}/openclipart-svg_0.18+dfsg-19_all.deb",
    "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    24_919_068,
)
_FOLDER = "usr/share/openclipart/"
_LONGEST_SIDE = 256  # px
_MOST_PIXELS = 2**24


def make_clipart(packages: Sequence[pathlib.Path], output: pathlib.Path) -> dict[pathlib.Path, int]:
    """Writes `clipart.tar`, at most 256 pixels wide and high; returns its number of pictures.

    The caption is the title in the metadata of a drawing's SVG file; its description and keywords
    are in the metadata. Left out are drawings without a title, and a few that are empty or have
    over 16 million pixels.
    """
    drawings, titles = packages
    suffix = f"{_FOLDER}svg/"
    texts = {
        name.removeprefix(suffix).removesuffix(".svg"): read_texts(data)
        for name, data in read_archive(titles, lambda name: _is_in(name, suffix, ".svg"))
    }
    path = output / "clipart.tar"
    return {path: write_pair_tar(path, _pairs(drawings, texts))}


def _is_in(name: str, folder: str, suffix: str) -> bool:
    return name.startswith(folder) and name.endswith(suffix)


def _pairs(
    package: pathlib.Path, texts: Mapping[str, tuple[str, dict[str, object]]]
) -> Iterator[ExamplePair]:
    folder = f"{_FOLDER}png/"
    for name, data in read_archive(package, lambda name: _is_in(name, folder, ".png")):
        name = name.removeprefix(folder).removesuffix(".png")
        title, metadata = texts.get(name, ("", {}))
        if not title:
            continue
        data = _shrink(data)
        if data is not None:  # a dot would end the key
            yield ExamplePair(name.replace(".", "_"), ".png", data, title, metadata)


def _shrink(data: bytes) -> bytes | None:
    """The drawing without sides that are too long; None where it is empty or gigantic."""
    try:
        with warnings.catch_warnings():  # of gigantic ones
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    if max(image.size) <= _LONGEST_SIDE:
        return data
    if image.width * image.height > _MOST_PIXELS:
        return None
    smaller = image.convert("RGBA")
    smaller.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    smaller.save(encoded, "PNG")
    return encoded.getvalue()


def read_texts(svg: bytes) -> tuple[str, dict[str, object]]:
    """Title, description and keywords of a drawing; empty where its file has none or is no XML."""
    try:
        root = ElementTree.fromstring(svg)
    except (ElementTree.ParseError, LookupError, ValueError):  # the last two: its encoding
        return "", {}
    work = next((element for element in root.iter() if _tag(element) == "Work"), None)
    fields = {} if work is None else {_tag(element): element for element in work}

    def text(name: str) -> str:
        return " ".join("".join(fields[name].itertext()).split()) if name in fields else ""

    items = fields["subject"].iter() if "subject" in fields else ()
    words = ((item.text or "").strip() for item in items if _tag(item) == "li")
    return text("title"), {
        "description": text("description"),
        "keywords": list(filter(None, words)),
    }


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
