"""Hashes of pictures, and an index of those of an evaluation set.

    python -m data_prep.duplicates.image_hashes --input cifar10_test.tar --output cifar10.npz

Two hashes: of the decoded pixels, which is the same for any lossless file of them; and a perceptual
one, 64 bits of the picture's lowest frequencies (pHash: signs, against their median, of the 8 x 8
lowest coefficients of the discrete cosine transform of 32 x 32 greys), which survives other sizes
and encodings. Two pictures with nothing in common differ in 32 bits, give or take 4.
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
_LEAST_SPREAD = 4.0  # standard deviation of the greys; flatter pictures have no perceptual hash
_CHUNK = 2**22  # comparisons at a time


class PictureHash(NamedTuple):
    """The hashes of one picture.

    Attributes:
        pixels: 16 bytes, of size and decoded pixels.
        perceptual: those of the picture and of its mirror image; None for a flat picture.
    """

    pixels: bytes
    perceptual: tuple[int, int] | None


class Match(NamedTuple):
    """A picture of a set: the key of its pair, and how another one is like it."""

    key: str
    how: str


def hash_picture(image: Image.Image) -> PictureHash:
    """The hashes of a decoded picture of mode "RGB"."""
    digest = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    small = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    greys = np.asarray(small, np.float64)
    if greys.std() < _LEAST_SPREAD:
        return PictureHash(digest.digest(), None)
    rows = _lowest_cosines()
    lowest = rows @ greys @ rows.T
    # In a mirror image the odd frequencies along a row have the other sign.
    mirrored = lowest * np.where(np.arange(_CELLS) % 2, -1, 1)
    return PictureHash(digest.digest(), (_pack(lowest), _pack(mirrored)))


@functools.cache
def _lowest_cosines() -> np.ndarray:
    """The first 8 rows of the DCT-II, without its scale, which changes no sign."""
    angles = np.pi * np.arange(_CELLS)[:, None] * (2 * np.arange(_SIDE) + 1) / (2 * _SIDE)
    return np.cos(angles)


def _pack(lowest: np.ndarray) -> int:
    bits = (lowest > np.median(lowest)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclasses.dataclass(frozen=True)
class Index:
    """The hashes of the pictures of a set; its file has an array for each attribute.

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
        """Hash of pixels -> the first row that has it."""
        return {row.tobytes(): i for i, row in reversed(list(enumerate(self.pixels)))}

    def digest(self) -> str:
        """A hash of all hashes; the same for the same pictures in any file."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("pixels", "perceptual", "has_perceptual"):
            digest.update(getattr(self, name).tobytes())
        return digest.hexdigest()

    def find(self, pictures: list[PictureHash | None], max_bits: int | None) -> list[Match | None]:
        """The picture of the index that each is a copy of.

        Args:
            pictures: None for one that could not be read.
            max_bits: that may differ, of the picture or its mirror image; None: equal pixels only.

        Returns:
            The first picture of equal pixels, or else the one whose hash differs least.
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
    """Reads a set of pictures, any source of `diht_jax.readers`.

    Raises:
        ValueError: nothing to read, or no picture in it.
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
    """The hashes of encoded bytes; None where they are no picture, or one of more pixels."""
    try:
        return hash_picture(decode_rgb(data, max_pixels=max_pixels))
    except ImageError:
        return None


def write_index(path: pathlib.Path, index: Index) -> None:
    """Writes the file that `open_index` reads."""
    arrays = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    with local_output(path) as local, open(local, "wb") as file:
        np.savez(file, **arrays)


@functools.lru_cache(maxsize=64)
def open_index(path: str) -> Index:
    """The index of a file, or of a set of pictures; it is kept for the next call.

    Args:
        path: of an index, also in a store, or a source of `make_index`.

    Raises:
        ValueError: it is neither.
    """
    if not path.endswith(SUFFIX):
        return make_index(path)
    try:
        with local_copy(path) as local:
            names = [field.name for field in dataclasses.fields(Index)]
            return Index(**{name: read_npz_array(local, name) for name in names})
    except StorageError:  # the file may be good
        raise
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected an index of python -m data_prep.duplicates.image_hashes "
            f"({type(error).__name__}: {error})"
        ) from error


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    flags.DEFINE_string("input", None, "Pictures of an evaluation set: a tar, a table, a folder.")
    flags.DEFINE_string("output", None, "File of the index, .npz.")


def main() -> None:
    """Writes the index that the flags name."""
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
