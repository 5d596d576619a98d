"""Drawings: Tux Paint's stamps, and clip art from the Open Clip Art Library.

The artists' titles of the clip art are not cleaned. Many are names of collections, in other
languages, or left over from the drawing that a file was copied from.
"""

from __future__ import annotations

import csv
import io
import pathlib
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence

from PIL import Image, UnidentifiedImageError

from data_prep.example_data.packages import ExamplePair, Package, read_archive, write_pair_tar
from diht_jax.input.transforms import encode
from diht_jax.storage.files import write_bytes

STAMPS = Package(
    "https://deb.debian.org/debian/pool/main/t/tuxpaint-stamps/"
    "tuxpaint-stamps-default_2025.03.31-1_all.deb",
    "6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
    80_872_956,
)
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
_STAMP_FOLDER = "usr/share/tuxpaint/stamps/"
_LETTERS = f"{_STAMP_FOLDER}symbols/alphabets/"
_TABLE = "captions.csv"
_FOLDER = "usr/share/openclipart/"
_LONGEST_SIDE = 256  # px
_MOST_PIXELS = 2**24


def make_pictures(
    packages: Sequence[pathlib.Path], output: pathlib.Path
) -> dict[pathlib.Path, int]:
    """Writes `pictures/captions.csv` and the pictures that it lists. Returns their number.

    Stamps are photos and drawings without a background; letters are left out. The caption is the
    English line of a stamp's text.

    Raises:
        ValueError: the folder contains other files.
    """
    (package,) = packages
    files = dict(read_archive(package, _is_of_a_stamp))
    captions = {}
    for name in sorted(files):
        text = files.get(f"{name.removesuffix('.png')}.txt")
        if name.endswith(".png") and text is not None:
            captions[name.removeprefix(_STAMP_FOLDER)] = text.decode().splitlines()[0].strip()
    table = _write_table(captions)
    folder = output / "pictures"
    _check_folder(folder, {*captions, _TABLE}, table)
    for name in captions:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(files[_STAMP_FOLDER + name])
    write_bytes(folder / _TABLE, table)  # last: if the table exists, all pictures do
    return {folder / _TABLE: len(captions)}


def _is_of_a_stamp(name: str) -> bool:
    is_file = name.startswith(_STAMP_FOLDER) and name.endswith((".png", ".txt"))
    return is_file and not name.startswith(_LETTERS)


def _write_table(captions: dict[str, str]) -> bytes:
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "caption"])
    rows.writerows(captions.items())
    return text.getvalue().encode()


def _check_folder(folder: pathlib.Path, names: set[str], table: bytes) -> None:
    """Raises ValueError if the folder contains files that are not of this example."""
    found = sorted(path for path in folder.rglob("*") if not path.is_dir())
    others = [path for path in found if path.relative_to(folder).as_posix() not in names]
    if (folder / _TABLE).exists() and (folder / _TABLE).read_bytes() != table:
        others.append(folder / _TABLE)
    if others:
        raise ValueError(
            f"{others[0]}: is no file of this example; name another folder by --output, or remove "
            f"{folder}"
        )


def make_clipart(packages: Sequence[pathlib.Path], output: pathlib.Path) -> dict[pathlib.Path, int]:
    """Writes `clipart.tar`, at most 256 px wide and high. Returns the number of pictures.

    Title, description and keywords come from the metadata in a drawing's SVG file; the title is the
    caption. Drawings without a title are left out, and a few that are empty or have over 16 million
    pixels.
    """
    drawings, titles = packages
    texts = {name: read_texts(data) for name, data in _read_all(titles, "svg")}
    path = output / "clipart.tar"
    return {path: write_pair_tar(path, _pairs(drawings, texts))}


def _read_all(package: pathlib.Path, kind: str) -> Iterator[tuple[str, bytes]]:
    """Yields the drawings of a package, by their names without folder and suffix."""
    folder, suffix = f"{_FOLDER}{kind}/", f".{kind}"

    def is_wanted(name: str) -> bool:
        return name.startswith(folder) and name.endswith(suffix)

    for name, data in read_archive(package, is_wanted):
        yield name.removeprefix(folder).removesuffix(suffix), data


def _pairs(
    package: pathlib.Path, texts: Mapping[str, tuple[str, dict[str, object]]]
) -> Iterator[ExamplePair]:
    for name, data in _read_all(package, "png"):
        title, metadata = texts.get(name, ("", {}))
        if not title:
            continue
        data = _shrink(data)
        if data is not None:  # keys must not contain a dot
            yield ExamplePair(name.replace(".", "_"), ".png", data, title, metadata)


def _shrink(data: bytes) -> bytes | None:
    """Shrinks a drawing to the maximum side length. Returns None if it is empty or gigantic."""
    try:
        with warnings.catch_warnings():  # about images that are too large
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
    return encode(smaller, "PNG")


def read_texts(svg: bytes) -> tuple[str, dict[str, object]]:
    """Returns title, description and keywords of a drawing, empty if missing or not valid XML."""
    try:
        root = ElementTree.fromstring(svg)
    except (ElementTree.ParseError, LookupError, ValueError):  # the last two: invalid encodings
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
