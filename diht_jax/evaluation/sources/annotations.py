"""Annotation files of vision-and-language sets: many rows, several of them on one image.

One pair comes out per image, whatever the number of its rows, so that each image is decoded and
embedded once. Read are a JSON list (ALBEF's files for COCO, Flickr30K, SNLI-VE and VQA v2) and
jsonl (Localized Narratives; Winoground's `examples.jsonl`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diht_jax.evaluation.sources.pictures import (
    ReadImage,
    Unit,
    join,
    picture_units,
    read_text,
    require,
)
from diht_jax.readers.base import Skipped, merge_captions, parse_json_object, pick_captions
from diht_jax.records.schema import Pair

IMAGE_COLUMN = "image"
CAPTION_FIELDS = ("caption", "sentence", "question")


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a `.json` list or a `.jsonl` file.

    Raises:
        ValueError: no such file, not JSON, or a row that is no object; names file and row.
    """
    text = read_text(path)
    if path.endswith(".jsonl"):
        rows = []
        # Not `splitlines`: JSON texts may hold other characters that it takes for line breaks.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(parse_json_object(line))
                except ValueError as error:
                    raise ValueError(f"{path}: line {number}: {error}") from error
        return rows
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON list ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON list of objects")
    return rows


def read_annotations(path: str, **options: str) -> Iterator[Pair | Skipped]:
    """Yields the pairs of `annotation_units`, which has the arguments."""
    for unit in annotation_units(path, **options):
        yield from unit()


def annotation_units(
    path: str,
    *,
    image_root: str | None = None,
    image_column: str = IMAGE_COLUMN,
    image_name: str = "{}",
) -> list[Unit]:
    """One pair per image, in the order in which the images first occur.

    Args:
        path: `.json` or `.jsonl`, local or in a store.
        image_root: folder of the images, or its URL; that of the file by default. Paths that lead
            out of it are refused.
        image_column: field of a row that names the image.
        image_name: how the file's name follows from it, such as "{}.jpg" or, for COCO's numbers,
            "{:0>12}.jpg".

    Returns:
        Units of pairs with the captions of all rows (fields `caption`, `sentence` or `question`)
        and the rows themselves as `metadata["rows"]`.

    Raises:
        ValueError: as `read_rows`; or a row without the image field.
    """
    require(path, "a .json or .jsonl file")
    by_image: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_rows(path)):
        value = row.get(image_column)
        if value in (None, ""):
            raise ValueError(
                f"{path}: row {number} has no field '{image_column}'; it has "
                f"{', '.join(list(row)[:20])[:500] or 'none'} (option image_column names another)"
            )
        if not isinstance(value, str | int):
            raise ValueError(
                f"{path}: row {number}: field '{image_column}' is {value!r:.80}; expected a name "
                "or a number"
            )
        by_image.setdefault(image_name.format(value), []).append(row)

    def make(item: tuple[str, list[dict[str, Any]]], read: ReadImage) -> Sequence[Pair | Skipped]:
        name, rows = item
        image = read(name)
        if isinstance(image, Skipped):
            return [image]
        captions = pick_captions([text for row in rows for text in _captions(row)])
        metadata = merge_captions({"rows": rows}, captions)
        return [Pair(name, image, captions[0] if captions else "", metadata)]

    root = image_root or os.path.dirname(path) or "."
    return picture_units(root, list(by_image.items()), make)


def count_annotations(path: str, *, image_column: str = IMAGE_COLUMN, **_: str) -> int:
    """Images that the rows name."""
    return len({str(row.get(image_column)) for row in read_rows(path)})


def read_winoground(path: str, **options: str) -> Iterator[Pair | Skipped]:
    """Yields the pairs of `winoground_units`, which has the arguments."""
    for unit in winoground_units(path, **options):
        yield from unit()


def winoground_units(
    path: str, *, image_root: str | None = None, image_name: str = "{}.png"
) -> list[Unit]:
    """Both images of every example of Winoground (arXiv 2204.03162), one after the other.

    The caption is the image's own; `metadata` holds `example` (its `id`) and `side` (0 or 1).

    Args:
        path: of `examples.jsonl`, with `caption_0`, `caption_1`, `image_0` and `image_1`; local or
            in a store.
        image_root: folder of the images, or its URL; `images` beside the file by default.
        image_name: how the file's name follows from `image_0`.

    Raises:
        ValueError: as `read_rows`; or a row without those fields.
    """
    require(path, "Winoground's examples.jsonl")
    rows = read_rows(path)
    for number, row in enumerate(rows):
        needed = [f"{what}_{side}" for what in ("image", "caption") for side in (0, 1)]
        missing = [name for name in needed if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"{path}: row {number}: expected texts as {', '.join(missing)}")

    def make(item: tuple[int, dict[str, Any]], read: ReadImage) -> Sequence[Pair | Skipped]:
        number, row = item
        entries: list[Pair | Skipped] = []
        for side in (0, 1):
            image = read(image_name.format(row[f"image_{side}"]))
            metadata = {"example": str(row.get("id", number)), "side": side}
            entries.append(
                image
                if isinstance(image, Skipped)
                else Pair(f"{number}_{side}", image, row[f"caption_{side}"], metadata)
            )
        return entries

    root = image_root or join(os.path.dirname(path), "images")
    return picture_units(root, list(enumerate(rows)), make)


def _captions(row: Mapping[str, Any]) -> list[str]:
    for field in CAPTION_FIELDS:
        if field in row:
            return pick_captions(row[field])
    return []
