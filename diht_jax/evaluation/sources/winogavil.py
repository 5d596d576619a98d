"""WinoGAViL: `winogavil:FILE`, a csv of games in which a cue is associated with some of the images.

Bitton et al., arXiv 2207.12576. Images occur in several games; one pair comes out for each, so that
it is decoded and embedded once.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from typing import Any

from diht_jax.evaluation.sources.pictures import (
    ReadImage,
    Unit,
    join,
    picture_units,
    read_text,
    require,
)
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair


def winogavil_units(
    path: str, *, image_root: str | None = None, image_name: str = "{}.jpg"
) -> list[Unit]:
    """One pair for each image, in the order in which the images first occur.

    Args:
        path: of `winogavil_dataset.csv`, with the columns `candidates` and `associations` (JSON
            lists of images) and `cue`; local or in a store.
        image_root: folder of the images, or its URL; `winogavil_images` beside the file by default.
        image_name: how the file's name follows from that of the image.

    Returns:
        Units of pairs whose `metadata["games"]` lists the games of the image, by `game` (number of
        the row), `cue`, `is_association` and the number of `candidates`.

    Raises:
        ValueError: no such file, or a row without those columns.
    """
    require(path, "WinoGAViL's winogavil_dataset.csv")
    games: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(csv.DictReader(io.StringIO(read_text(path)))):
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

    def make(item: tuple[str, list[dict[str, Any]]], read: ReadImage) -> Sequence[Pair | Skipped]:
        name, own = item
        image = read(image_name.format(name))
        return [image if isinstance(image, Skipped) else Pair(name, image, "", {"games": own})]

    root = image_root or join(os.path.dirname(path) or ".", "winogavil_images")
    return picture_units(root, list(games.items()), make)


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
