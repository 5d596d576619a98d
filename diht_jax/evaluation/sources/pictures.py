"""What the readers of lists and annotations share: texts and pictures, local or in a store."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from PIL import Image

from diht_jax.input.decode import MAX_PIXELS, ImageError, decode_rgb
from diht_jax.readers.base import Skipped, read_image
from diht_jax.readers.tables import map_ahead
from diht_jax.records.schema import Pair
from diht_jax.storage.files import exists, read_bytes
from diht_jax.storage.retries import StorageError
from diht_jax.storage.stores import is_remote

# Reads a part of a source.
Unit = Callable[[], Iterator[Pair | Skipped]]
ReadImage = Callable[[str], bytes | Skipped]
Item = TypeVar("Item")
# Left, top, right and bottom, in pixels.
Box = tuple[int, int, int, int]

# Small enough that 5,000 pictures are shared by 64 hosts.
_PICTURES_PER_UNIT = 64


@dataclasses.dataclass(frozen=True)
class CroppedPair(Pair):
    """A pair on a part of a picture.

    Attributes:
        box: the part; what of it lies outside of the picture is black.
    """

    box: Box = dataclasses.field(kw_only=True)


def decode_picture(pair: Pair) -> Image.Image:
    """The picture of a pair as `decode_rgb` gives it, cut to its box where it has one.

    Raises:
        ImageError: as `decode_rgb`; "too_large" for a box, too.
    """
    picture = decode_rgb(pair.image)
    if not isinstance(pair, CroppedPair):
        return picture
    left, top, right, bottom = pair.box
    if (right - left) * (bottom - top) > MAX_PIXELS:
        raise ImageError("too_large", f"box {pair.box}: at most {MAX_PIXELS} pixels are cut out")
    return picture.crop(pair.box)


def read_text(path: str) -> str:
    """A UTF-8 text file, local or in a store, without a byte order mark.

    Raises:
        ValueError: there is none, or it is no such text.
        StorageError: it cannot be read, now and after some attempts.
    """
    try:
        return read_bytes(path).decode("utf-8-sig")
    except StorageError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error


def join(folder: str, *names: str) -> str:
    """A path below a folder or below the URL of one."""
    return (
        "/".join([folder.rstrip("/"), *names])
        if is_remote(folder)
        else os.path.join(folder, *names)
    )


def require(path: str, what: str) -> None:
    """Raises ValueError where there is no such file or folder."""
    if not exists(path):
        raise ValueError(f"nothing at '{path}'; expected {what}")


def picture_units(
    root: str, items: Sequence[Item], make: Callable[[Item, ReadImage], Sequence[Pair | Skipped]]
) -> list[Unit]:
    """Divides items into units, and reads their pictures; several at a time from a store.

    Args:
        root: folder of the pictures, or its URL.
        items: what `make` takes.
        make: the entries of an item, given a function that reads a picture below `root`.
    """
    root = root if is_remote(root) else os.path.realpath(root)

    def make_one(item: Item) -> Sequence[Pair | Skipped]:
        return make(item, lambda name: read_image(root, name, name))

    def read(part: Sequence[Item]) -> Iterator[Pair | Skipped]:
        for entries in map_ahead(make_one, part) if is_remote(root) else map(make_one, part):
            yield from entries

    starts = range(0, len(items), _PICTURES_PER_UNIT)
    return [lambda part=items[start : start + _PICTURES_PER_UNIT]: read(part) for start in starts]
