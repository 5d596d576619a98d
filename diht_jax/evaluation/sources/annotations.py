"""Annotation files of vision-and-language sets: many rows, several of them on one image.

One pair comes out per image, however many rows name it, so that each image is decoded and
embedded once. Read are a JSON list (ALBEF's files for COCO, Flickr30K, SNLI-VE and VQA v2), jsonl
(Localized Narratives; Winoground's `examples.jsonl`) and WinoGAViL's csv.

In all of them `image_root` is the folder of the images, or its URL, where it is another than next
to the file, and `image_name` how a file's name follows from what names the image, such as "{}.jpg"
or, for COCO's numbers, "{:0>12}.jpg". A file that is missing, or a row that is not as expected, is
a ValueError that names it.
"""

from __future__ import annotations

import json
import os
from typing import Any

from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.sources.pictures import picture_units
from diht_jax.evaluation.sources.text_files import check_texts, read_csv, read_json, read_text
from diht_jax.records.samples import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    find_name,
    merge_captions,
    pick_captions,
)
from diht_jax.records.schema import Pair, parse_json_object
from diht_jax.storage.files import join

_CAPTION_FIELDS = (*CAPTION_NAMES, "sentence", "question")


def read_rows(path: str, what: str = "a JSON list of objects") -> list[dict[str, Any]]:
    """Reads the rows of a `.json` list or a `.jsonl` file.

    Raises:
        ValueError: no such file, not JSON, or a row that is no object; names file and row.
    """
    if path.endswith(".jsonl"):
        rows = []
        # Not `splitlines`: JSON texts may hold other characters that it takes for line breaks.
        for number, line in enumerate(read_text(path, what).split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(parse_json_object(line))
                except ValueError as error:
                    raise ValueError(f"{path}: line {number}: {error}") from error
        return rows
    rows = read_json(path, list, what)
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON list of objects")
    return rows


def annotation_units(
    path: str,
    *,
    image_root: str | None = None,
    image_column: str | None = None,
    image_name: str = "{}",
) -> Units:
    """One pair per image, in the order in which the images first occur.

    A pair has the captions of all rows (`samples.CAPTION_NAMES`, `sentence` or `question`), and the
    rows themselves as `metadata["rows"]`; `image_column` is the field of a row that names the
    image, or one of `samples.IMAGE_NAMES` where it is None.
    """
    by_image: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_rows(path)):
        field = image_column or find_name(row, IMAGE_NAMES) or "image"
        value = row.get(field)
        if value in (None, ""):
            raise ValueError(
                f"{path}: row {number} has no field '{field}'; it has "
                f"{', '.join(list(row)[:20])[:500] or 'none'} (option image_column names another)"
            )
        if not isinstance(value, str | int):
            raise ValueError(
                f"{path}: row {number}: field '{field}' is {value!r:.80}; expected a name "
                "or a number"
            )
        by_image.setdefault(image_name.format(value), []).append(row)
    items = []
    for name, rows in by_image.items():
        fields = [find_name(row, _CAPTION_FIELDS) for row in rows]
        texts = [
            pick_captions(row[field]) for row, field in zip(rows, fields, strict=True) if field
        ]
        captions = pick_captions([text for own in texts for text in own])
        metadata = merge_captions({"rows": rows}, captions)
        items.append((name, [Pair(name, b"", captions[0] if captions else "", metadata)]))
    return picture_units(image_root or os.path.dirname(path) or ".", items)


def winoground_units(
    path: str, *, image_root: str | None = None, image_name: str = "{}.png"
) -> Units:
    """Both images of every example of Winoground (arXiv 2204.03162), one after the other.

    The caption is the image's own; `metadata` holds `example` (its `id`) and `side` (0 or 1).
    """
    items = []
    for number, row in enumerate(read_rows(path, "Winoground's examples.jsonl")):
        check_texts(path, number, row, ("image_0", "image_1", "caption_0", "caption_1"))
        for side in (0, 1):
            metadata = {"example": str(row.get("id", number)), "side": side}
            pair = Pair(f"{number}_{side}", b"", row[f"caption_{side}"], metadata)
            items.append((image_name.format(row[f"image_{side}"]), [pair]))
    return picture_units(image_root or join(os.path.dirname(path), "images"), items)


def winogavil_units(
    path: str, *, image_root: str | None = None, image_name: str = "{}.jpg"
) -> Units:
    """WinoGAViL (arXiv 2207.12576): a csv of games in which a cue goes with some of the images.

    Images occur in several games; one pair comes out for each. Its `metadata["games"]` lists the
    games of the image, by `game` (number of the row), `cue`, `is_association` and the number of
    `candidates`.
    """
    games: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_csv(path, "WinoGAViL's winogavil_dataset.csv")):
        candidates, associations = (
            _read_images(path, number, row, name) for name in ("candidates", "associations")
        )
        if not row.get("cue") or not 0 < len(associations) < len(candidates):
            raise ValueError(
                f"{path}: row {number}: expected a cue, and fewer associations than candidates"
            )
        for image in candidates:
            game = {
                "game": number,
                "cue": row["cue"],
                "is_association": image in associations,
                "candidates": len(candidates),
            }
            games.setdefault(image, []).append(game)
    root = image_root or join(os.path.dirname(path) or ".", "winogavil_images")
    items = [
        (image_name.format(name), [Pair(name, b"", "", {"games": own})])
        for name, own in games.items()
    ]
    return picture_units(root, items)


def _read_images(path: str, number: int, row: dict[str, str], column: str) -> list[str]:
    try:
        images = json.loads(row[column])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        images = error
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise ValueError(
            f"{path}: row {number}: expected a JSON list of images as '{column}'; it has "
            f"{', '.join(str(name) for name in row)[:200]}"
        )
    return images
