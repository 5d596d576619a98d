"""Lists of pictures whose first folder is their class: `list:FILE`.

Birdsnap's `test_images.txt` (a line "path", then "Acadian_Flycatcher/299764.jpg") and UCF-101's
`testlist01.txt` ("ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi") are such. A clip stands for a
picture of the same name, which is to be made of its middle frame.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from typing import Any

from diht_jax.evaluation.sources.pictures import (
    ReadImage,
    Unit,
    picture_units,
    read_text,
)
from diht_jax.readers.base import IMAGE_EXTENSIONS, Skipped
from diht_jax.records.schema import Pair

_CLIP_SUFFIX = ".avi"
_HEADER = "path"


def list_units(
    path: str, *, image_root: str | None = None, splits: str | None = None
) -> list[Unit]:
    """The pictures of one list, or of several, each picture once.

    Args:
        path: of the list; with `splits` its name holds a field for the number, such as
            "testlist{:02}.txt".
        image_root: folder of the pictures; that of the list by default.
        splits: numbers of test splits with commas between them.

    Returns:
        Units of pairs with `class_name`, and `splits` where there are some, in their metadata.

    Raises:
        ValueError: no such list, a line without a folder, or splits that are no numbers.
    """
    members = _read_lists(path, splits)

    def make(name: str, read: ReadImage) -> Sequence[Pair | Skipped]:
        stem, suffix = posixpath.splitext(name)
        image = read(f"{stem}.{IMAGE_EXTENSIONS[0]}" if suffix.lower() == _CLIP_SUFFIX else name)
        if isinstance(image, Skipped):
            return [image]
        class_name = name.split("/", 1)[0]
        metadata: dict[str, Any] = {"class_name": class_name}
        if splits is not None:
            metadata["splits"] = members[name]
        return [Pair(name, image, class_name.replace("_", " "), metadata)]

    root = image_root or posixpath.dirname(path) or "."
    return picture_units(root, list(members), make)


def count(path: str, *, image_root: str | None = None, splits: str | None = None) -> int:
    """Pictures of all lists together."""
    return len(_read_lists(path, splits))


def class_names(
    path: str, *, image_root: str | None = None, splits: str | None = None
) -> tuple[str, ...]:
    """The folders in order, "_" as a space; those whose pictures are missing, too."""
    folders = sorted({name.split("/", 1)[0] for name in _read_lists(path, splits)})
    return tuple(folder.replace("_", " ") for folder in folders)


def _read_lists(path: str, splits: str | None) -> dict[str, list[int]]:
    """Picture -> the numbers of the lists that have it; in the order of the lists."""
    if splits is None:
        return dict.fromkeys(_read_list(path), [])
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", splits):
        raise ValueError(f"splits={splits}: expected numbers, such as 1 or 1,2,3")
    numbers = sorted({int(number) for number in splits.split(",")})
    try:
        paths = [path.format(number) for number in numbers]
    except (AttributeError, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected one field such as '{{:02}}' ({error!r})") from error
    if len(set(paths)) < len(numbers):
        raise ValueError(
            f"{path}: {len(numbers)} splits in one list; expected a field for the number in its "
            "name, such as 'testlist{:02}.txt'"
        )
    members: dict[str, list[int]] = {}
    for number, one in zip(numbers, paths, strict=True):
        for name in _read_list(one):
            members.setdefault(name, []).append(number)
    return members


def _read_list(path: str) -> list[str]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    # A training list of UCF-101 has the number of the class behind each clip.
    names = [re.sub(r"\s+\d+$", "", line) for line in lines if line and line != _HEADER]
    bad = next((name for name in names if "/" not in name.strip("/")), None)
    if bad is not None or not names:
        raise ValueError(
            f"{path}: expected one picture a line, such as 'Archery/v_Archery_g01_c01.avi', "
            + ("the list is empty" if bad is None else f"got '{bad[:99]}'")
        )
    return list(dict.fromkeys(names))
