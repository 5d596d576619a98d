"""Small packages with the same files as the real ones, for tests without a network."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.example_data.photos import CAPTIONS as PHOTOS
from data_prep.example_data.registry import EXAMPLES
from tests import make

EMOJI = {
    "2764-fe0f": "red heart",
    "1f34f": "green apple",
    "1f602": "face with tears of joy",
    "26bd": "soccer ball",
    "1f4d8": "blue book",
    "1f1ef-1f1f5": "japan flag",
    **{f"1f5{number}": f"clock number {number}" for number in range(10, 30)},
}
STAMPS = {f"food/fruit/{number}": f"A basket of {number} apples." for number in range(60)}
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer")


def tgz(files: Mapping[str, bytes]) -> bytes:
    """Returns the bytes of a gzip-compressed tar."""
    return _tar(files, "w:gz")


def _tar(files: Mapping[str, bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def deb(files: Mapping[str, bytes]) -> bytes:
    """Returns the bytes of a Debian package with these files below `./`."""
    data = lzma.compress(_tar({f"./{name}": data for name, data in files.items()}, "w"))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data}
    archive = b"!<arch>\n"
    for name, content in members.items():
        header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n"
        archive += header.encode() + content + b"\n" * (len(content) % 2)
    return archive


def whl(files: Mapping[str, bytes]) -> bytes:
    """Returns the bytes of a wheel with these files."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def emoji_row(key: str, name: str, category: str = "Objects", **more: Any) -> dict[str, Any]:
    """Returns a row of the table of an emoji-datasource package."""
    row = {"name": name, "image": f"{key}.png", "category": category, "subcategory": "a"}
    return row | more


def emoji(artist: str, table: list[Mapping[str, Any]], names: Mapping[str, bytes]) -> bytes:
    """Returns an emoji-datasource package with this table and the named pictures."""
    files = {"package/emoji.json": json.dumps(table).encode()}
    files |= {f"package/img/{artist}/64/{name}.png": data for name, data in names.items()}
    return tgz(files | {f"package/img/{artist}/sheets/64.png": b"all of them"})


def cifar_rows(labels: list[int], pixels: np.ndarray) -> bytes:
    """Encodes rows of CIFAR-10's binary files; `pixels` is uint8 [n, 32, 32, 3]."""
    rows = zip(labels, pixels, strict=True)
    return b"".join(bytes([label]) + each.transpose(2, 0, 1).tobytes() for label, each in rows)


def cifar(train: bytes, test: bytes) -> bytes:
    """Returns an archive like CIFAR-10's binary version, with one training batch."""
    names = "\n".join(CIFAR_CLASSES).encode() + b"\n\n"
    files = {"batches.meta.txt": names, "data_batch_1.bin": train, "test_batch.bin": test}
    return tgz({f"cifar-10-batches-bin/{name}": data for name, data in files.items()})


def small_packages() -> dict[str, list[bytes]]:
    """Returns the packages of each example except `openmoji`, in order."""
    table = [emoji_row(key, name.upper()) for key, name in EMOJI.items()]
    drawn = {
        artist: {key: make.png(seed + n, (64, 64)) for n, key in enumerate(EMOJI)}
        for artist, seed in (("google", 0), ("twitter", 100))
    }
    stamps = {f"{name}.txt": f"{text}\naf.utf8=x\n".encode() for name, text in STAMPS.items()}
    stamps |= {f"{name}.png": make.png(n, (50, 40)) for n, name in enumerate(STAMPS)}
    photos = {name: make.encoded(make.noise(n, (500, 300), 20)) for n, name in enumerate(PHOTOS)}
    packed = whl(photos)
    labels = [n % len(CIFAR_CLASSES) for n in range(60)]
    pixels = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    rows = cifar_rows(labels, pixels)
    return {
        "emoji": [emoji(artist, table, pictures) for artist, pictures in drawn.items()],
        "pictures": [deb({f"usr/share/tuxpaint/stamps/{n}": d for n, d in stamps.items()})],
        "photos": [packed, packed],
        "cifar10": [cifar(rows, rows[: len(rows) // 2])],
    }


def replace_packages(
    monkeypatch: pytest.MonkeyPatch, contents: Mapping[str, list[bytes]]
) -> dict[str, bytes]:
    """Replaces packages in the table of examples; returns the new files by name."""
    files = {}
    for name, each in contents.items():
        packages = []
        for package, content in zip(EXAMPLES[name].packages, each, strict=True):
            sha256 = hashlib.sha256(content).hexdigest()
            packages.append(dataclasses.replace(package, sha256=sha256, num_bytes=len(content)))
            files[package.name] = content
        replaced = dataclasses.replace(EXAMPLES[name], packages=tuple(packages))
        monkeypatch.setitem(EXAMPLES, name, replaced)
    return files


def decode(data: bytes) -> np.ndarray:
    """Returns the pixels of a picture file."""
    return np.asarray(Image.open(io.BytesIO(data)))
