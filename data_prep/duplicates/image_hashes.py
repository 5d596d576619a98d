"""Hashes of images, and a file with the hashes of an evaluation set.

    python -m data_prep.duplicates.image_hashes --input cifar10_test.tar --output cifar10.npz

There are two hashes. The hash of the decoded pixels is equal for all lossless files of an image.
The perceptual hash has 64 bits of the lowest frequencies, and survives resizing and re-encoding
(pHash: signs, relative to their median, of the 8 x 8 lowest coefficients of the discrete cosine
transform of 32 x 32 grey values). Hashes of unrelated images differ in 32 bits, give or take 4.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
from typing import NamedTuple

import numpy as np
from absl import flags, logging
from PIL import Image

from diht_jax import command_line
from diht_jax.input.transforms import MAX_PIXELS, ImageError, decode_rgb
from diht_jax.readers.array_files import read_npz_array
from diht_jax.readers.registry import open_source
from diht_jax.records.schema import Pair
from diht_jax.storage.copies import local_copy
from diht_jax.storage.files import local_output
from diht_jax.storage.stores import StorageError
from diht_jax.terminal import print_escaped

SUFFIX = ".npz"

_SIDE, _CELLS = 32, 8
_LEAST_SPREAD = 4.0  # standard deviation of the grey values; flatter images have no perceptual hash
_CHUNK = 2**22  # comparisons at a time


class PictureHash(NamedTuple):
    """Hashes of one image.

    Attributes:
        pixels: 16 bytes, hash of the size and the decoded pixels.
        perceptual: hashes of the image and of its mirror image; None for a flat image.
    """

    pixels: bytes
    perceptual: tuple[int, int] | None


class Match(NamedTuple):
    """Match in a set of images: the key of the matching pair, and how the images are similar."""

    key: str
    how: str


def hash_picture(image: Image.Image) -> PictureHash:
    """Hashes a decoded image of mode "RGB"."""
    digest = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    greys = np.asarray(small, np.float64)
    if greys.std() < _LEAST_SPREAD:
        return PictureHash(digest.digest(), None)
    rows = _lowest_cosines()
    lowest = rows @ greys @ rows.T
    # Mirroring changes the sign of the odd frequencies along a row.
    mirrored = lowest * np.where(np.arange(_CELLS) % 2, -1, 1)
    return PictureHash(digest.digest(), (_pack(lowest), _pack(mirrored)))


@functools.cache
def _lowest_cosines() -> np.ndarray:
    """Returns the first 8 rows of the DCT-II, unscaled, because the scale changes no sign."""
    angles = np.pi * np.arange(_CELLS)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
    return np.cos(angles)


def _pack(lowest: np.ndarray) -> int:
    bits = (lowest > np.median(lowest)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclasses.dataclass(frozen=True)
class Index:
    """Hashes of all images of a set; the file has one array per attribute.

    Attributes:
        keys: str [n].
        pixels: uint8 [n, 16].
        perceptual: uint64 [n].
        has_perceptual: bool [n].
    """

    keys: np.ndarray
    pixels: np.ndarray
    perceptual: np.ndarray
    has_perceptual: np.ndarray

    @functools.cached_property
    def _by_pixels(self) -> dict[bytes, int]:
        """Maps the hash of the pixels to the first row that has it."""
        return {row.tobytes(): i for i, row in reversed(list(enumerate(self.pixels)))}

    def digest(self) -> str:
        """Returns a hash of all hashes; equal for the same images in any file format."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("pixels", "perceptual", "has_perceptual"):
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()

    def find(self, pictures: list[PictureHash | None], max_bits: int | None) -> list[Match | None]:
        """Finds the image of the set that each given image is a copy of.

        Args:
            pictures: hashes of images; None for unreadable images.
            max_bits: bits of the perceptual hash that may differ, mirrored or not; None ignores it.

        Returns:
            The first image with equal pixels, or else the one with the fewest different bits.
        """
        found: list[Match | None] = [None] * len(pictures)
        asked: list[tuple[int, tuple[int, int]]] = []
        for number, picture in enumerate(pictures):
            row = None if picture is None else self._by_pixels.get(picture.pixels)
            if row is not None:
                found[number] = Match(str(self.keys[row]), "equal pixels")
            elif picture is not None and picture.perceptual is not None and max_bits is not None:
                asked.append((number, picture.perceptual))
        rows = np.flatnonzero(self.has_perceptual)
        known = self.perceptual[rows]
        size = max(1, _CHUNK // max(1, len(rows)))
        for start in range(0, len(asked) if len(rows) else 0, size):
            some = asked[start : start + size]
            hashes = np.array([perceptual for _, perceptual in some], np.uint64)
            bits = np.bitwise_count(hashes[:, :, None] ^ known).min(axis=1)
            for (number, _), row, least in zip(some, bits.argmin(1), bits.min(1), strict=True):
                if least <= max_bits:
                    how = f"{least} of 64 bits differ"
                    found[number] = Match(str(self.keys[rows[row]]), how)
        return found


def make_index(source: str) -> Index:
    """Hashes the images of any source of `diht_jax.readers`.

    Raises:
        ValueError: there is nothing to read, or there are no images.
    """
    keys, hashes, skipped = [], [], 0
    for entry in open_source(source):
        picture = try_hash(entry.image) if isinstance(entry, Pair) else None
        if picture is None:
            skipped += 1
            continue
        keys.append(entry.key)
        hashes.append(picture)
    if skipped:
        logging.warning("%s: %d entries have no picture and caption", source, skipped)
    if not keys:
        raise ValueError(f"{source}: no pictures")
    return Index(
        np.array(keys),
        np.frombuffer(b"".join(found.pixels for found in hashes), np.uint8).reshape(-1, 16),
        np.array([found.perceptual[0] if found.perceptual else 0 for found in hashes], np.uint64),
        np.array([found.perceptual is not None for found in hashes]),
    )


def try_hash(data: bytes, max_pixels: int = MAX_PIXELS) -> PictureHash | None:
    """Hashes an encoded image; returns None if it is unreadable or has too many pixels."""
    try:
        return hash_picture(decode_rgb(data, max_pixels=max_pixels))
    except ImageError:
        return None


def write_index(path: pathlib.Path, index: Index) -> None:
    """Writes a file for `open_index`."""
    arrays = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    with local_output(path) as local, open(local, "wb") as file:
        np.savez(file, **arrays)


@functools.lru_cache(maxsize=64)
def open_index(path: str) -> Index:
    """Opens a file of hashes, or hashes a set of images; the result is cached.

    Args:
        path: path or URL of a file of hashes, or a source for `make_index`.

    Raises:
        ValueError: it is neither.
    """
    if not path.endswith(SUFFIX):
        return make_index(path)
    try:
        with local_copy(path) as local:
            names = [field.name for field in dataclasses.fields(Index)]
            return Index(**{name: read_npz_array(local, name) for name in names})
    except StorageError:  # the file itself may be good
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected an index of python -m data_prep.duplicates.image_hashes "
            f"({type(error).__name__}: {error})"
        ) from error


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    flags.DEFINE_string("input", None, "Pictures of an evaluation set: a tar, a table, a folder.")
    flags.DEFINE_string("output", None, "File of the index, .npz.")


def main() -> None:
    """Hashes the images given by the flags, and writes the file."""
    command_line.require_flags("input", "output")
    output = pathlib.Path(flags.FLAGS.output)
    if output.suffix != SUFFIX:
        raise ValueError(f"--output={output}; expected a name that ends with {SUFFIX}")
    output.parent.mkdir(parents=True, exist_ok=True)
    index = make_index(flags.FLAGS.input)
    write_index(output, index)
    print_escaped(f"{len(index.keys):,} pictures: {output}")


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
