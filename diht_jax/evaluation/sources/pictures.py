"""Texts and pictures of the layouts of benchmarks, local or in a store."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from PIL import Image

from diht_jax.evaluation.embedding.entries import Unit
from diht_jax.input.decode import MAX_PIXELS, ImageError, decode_rgb
from diht_jax.readers.base import Skipped, read_image
from diht_jax.readers.tables import map_ahead
from diht_jax.records.schema import Pair
from diht_jax.storage.files import exists, read_bytes
from diht_jax.storage.retries import StorageError
from diht_jax.storage.stores import is_remote

# Left, top, right and bottom, in pixels.
Box = tuple[int, int, int, int]
# File of a picture below some folder, and its pairs, still without the image; or why it has none.
Item = tuple[str, "Sequence[Pair] | Skipped"]

# Small enough that 5,000 pictures are shared by 64 hosts.
_PICTURES_PER_UNIT = 64


@dataclasses.dataclass(frozen=True)
class CroppedPair(Pair):
    """A pair on a part of a picture.

    Attributes:
        box: the part; what of it is outside of the picture is black.
    """

    box: Box = dataclasses.field(kw_only=True)


class Units(list[Unit]):
    """The parts of a source, and about how many entries they have."""

    def __init__(self, units: Iterable[Unit], count: Callable[[], int | None] = lambda: None):
        """Joins them.

        Args:
            units: in the order of the entries.
            count: makes the number of entries, which may be an estimate; None where it is unknown.
        """
        super().__init__(units)
        self.count_entries = count


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
    """Reads a UTF-8 text file, local or in a store, without a byte order mark.

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


def read_json(path: str, kind: type, what: str) -> Any:
    """Reads a JSON file, local or in a store.

    Args:
        path: of the file.
        kind: of its value, `list` or `dict`.
        what: what is expected, for the message.

    Raises:
        ValueError: no such file, or another value.
    """
    try:
        value = json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError(f"{path}: expected {what} ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected {what} ({error})") from error
    if not isinstance(value, kind):
        raise ValueError(f"{path}: expected {what}")
    return value


def require(path: str, what: str) -> None:
    """Raises ValueError where there is no such file or folder."""
    if not exists(path):
        raise ValueError(f"nothing at '{path}'; expected {what}")


def check_texts(path: str, number: Any, row: Any, names: Sequence[str]) -> None:
    """Raises ValueError where a row of a file lacks one of these texts; names file and row."""
    missing = [n for n in names if not (isinstance(row, dict) and isinstance(row.get(n), str))]
    if missing:
        raise ValueError(f"{path}: row {number!s:.20}: expected texts as {', '.join(missing)}")


def picture_units(root: str, items: Sequence[Item]) -> Units:
    """Divides pictures into units that read them; several at a time from a store.

    Args:
        root: folder of the pictures, or its URL. What leads out of it is refused.
        items: a picture that cannot be read is one `Skipped`, however many pairs it has.
    """
    root = root if is_remote(root) else os.path.realpath(root)

    def read_item(item: Item) -> Sequence[Pair | Skipped]:
        name, pairs = item
        image = pairs if isinstance(pairs, Skipped) else read_image(root, name, name)
        if isinstance(image, Skipped):
            return [image]
        return [dataclasses.replace(pair, image=image) for pair in pairs]

    def read(part: Sequence[Item]) -> Iterator[Pair | Skipped]:
        for entries in (map_ahead if is_remote(root) else map)(read_item, part):
            yield from entries

    starts = range(0, len(items), _PICTURES_PER_UNIT)
    parts = [items[start : start + _PICTURES_PER_UNIT] for start in starts]
    count = sum(1 if isinstance(pairs, Skipped) else len(pairs) for _, pairs in items)
    return Units([functools.partial(read, part) for part in parts], lambda: count)
