"""Annotation files of vision-and-language sets: many rows, several of them on one image.

Called by `sources`. One pair comes out per image, whatever the number of its rows, so that each
image is decoded and embedded once. Read are a JSON list (ALBEF's files for COCO, Flickr30K,
SNLI-VE and VQA v2) and jsonl (Localized Narratives; Winoground's `examples.jsonl`).
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from diht_jax.data.schema import Pair
from diht_jax.data.source import (
    MAX_IMAGE_BYTES,
    Skipped,
    merge_captions,
    parse_json_object,
    pick_captions,
)

CAPTION_FIELDS = ("caption", "sentence", "question")


def read_rows(path: str) -> list[dict[str, Any]]:
    """The rows of a `.json` list or a `.jsonl` file.

    Raises:
        ValueError: no such file, not JSON, or a row that is no object; names file and row.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a UTF-8 text file ({error})") from error
    if path.endswith(".jsonl"):
        rows = []
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(parse_json_object(line))
                except ValueError as error:
                    raise ValueError(f"{path}: line {number}: {error}") from error
        return rows
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: expected a JSON list ({error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a JSON list of objects")
    return rows


def read_annotations(
    path: str,
    *,
    image_root: str | None = None,
    image_column: str = "image",
    image_name: str = "{}",
) -> Iterator[Pair | Skipped]:
    """Yields one pair per image, in the order in which the images first occur.

    Args:
        path: `.json` or `.jsonl`.
        image_root: folder of the images; that of the file by default. Paths that lead out of it
            are refused.
        image_column: field of a row that names the image.
        image_name: how the file's name follows from it, such as "{}.jpg" or, for COCO's numbers,
            "{:0>12}.jpg".

    Returns:
        Pairs with the captions of all rows (fields `caption`, `sentence` or `question`) and the
        rows themselves as `metadata["rows"]`.

    Raises:
        ValueError: as `read_rows`; or a row without the image field.
    """
    by_image: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_rows(path)):
        if row.get(image_column) in (None, ""):
            raise ValueError(
                f"{path}: row {number} has no field '{image_column}'; it has "
                f"{', '.join(row) or 'none'} (option image_column names another)"
            )
        by_image.setdefault(image_name.format(row[image_column]), []).append(row)
    root = os.path.realpath(image_root or os.path.dirname(path) or ".")
    for name, rows in by_image.items():
        image = read_image(root, name)
        if isinstance(image, Skipped):
            yield image
            continue
        captions = pick_captions([text for row in rows for text in _captions(row)])
        metadata = merge_captions({"rows": rows}, captions)
        yield Pair(name, image, captions[0] if captions else "", metadata)


def read_winoground(
    path: str, *, image_root: str | None = None, image_name: str = "{}.png"
) -> Iterator[Pair | Skipped]:
    """Yields both images of every example of Winoground (arXiv 2204.03162), one after the other.

    The caption is the image's own; `metadata` holds `example` (its `id`) and `side` (0 or 1).

    Args:
        path: of `examples.jsonl`, with `caption_0`, `caption_1`, `image_0` and `image_1`.
        image_root: folder of the images; `images` beside the file by default.
        image_name: how the file's name follows from `image_0`.

    Raises:
        ValueError: as `read_rows`; or a row without those fields.
    """
    root = os.path.realpath(image_root or os.path.join(os.path.dirname(path), "images"))
    for number, row in enumerate(read_rows(path)):
        needed = [f"{what}_{side}" for what in ("image", "caption") for side in (0, 1)]
        missing = [name for name in needed if not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"{path}: row {number}: expected texts as {', '.join(missing)}")
        for side in (0, 1):
            image = read_image(root, image_name.format(row[f"image_{side}"]))
            if isinstance(image, Skipped):
                yield image
                continue
            metadata = {"example": str(row.get("id", number)), "side": side}
            yield Pair(f"{number}_{side}", image, row[f"caption_{side}"], metadata)


def read_image(root: str, name: str) -> bytes | Skipped:
    """The bytes of an image below `root`, which is a real path; or why there are none."""
    if "\0" in name:
        return Skipped(name, "refused_path", "a NUL character in the path")
    # Resolved first, so that neither ".." nor a link leads out of the folder.
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath([root, path]) != root:
        return Skipped(name, "refused_path", f"'{name}' leads out of '{root}'")
    try:
        if os.path.getsize(path) > MAX_IMAGE_BYTES:
            return Skipped(name, "too_large", f"'{name}' has over {MAX_IMAGE_BYTES} bytes")
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        return Skipped(name, "no_image", f"'{name}': {error.strerror}")


def _captions(row: Mapping[str, Any]) -> list[str]:
    for field in CAPTION_FIELDS:
        if field in row:
            return pick_captions(row[field])
    return []
