"""Reads annotation files of vision-and-language sets, which may have several rows per image.

All rows of an image become one pair, so each image is decoded and embedded once. Supported are JSON
lists (ALBEF's files for COCO, Flickr30K, SNLI-VE and VQA v2), jsonl (Localized Narratives), and the
files of Winoground, WinoGAViL, SugarCrepe and ARO.

`image_root` is the folder of the images, or its URL, if it is not next to the file. `image_name` is
a format that maps the image's name or number to a file name, such as "{}.jpg" or, for COCO's
numbers, "{:0>12}.jpg". A missing file or a malformed row is a ValueError that names it.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diht_jax.evaluation.embedding.entries import Box, CroppedPair, Units
from diht_jax.evaluation.sources.files import (
    check_texts,
    picture_units,
    read_csv,
    read_json,
    read_text,
)
from diht_jax.records.samples import (
    CAPTION_NAMES,
    IMAGE_NAMES,
    find_name,
    merge_captions,
    pick_captions,
)
from diht_jax.records.schema import Pair
from diht_jax.storage.files import join, parse_json

_CAPTION_FIELDS = (*CAPTION_NAMES, "sentence", "question")


def read_rows(path: str, what: str = "a JSON list of objects") -> list[dict[str, Any]]:
    """Reads the rows of a `.json` list or a `.jsonl` file; errors name the file and the row."""
    if path.endswith(".jsonl"):
        rows = []
        # Not `splitlines`, which also splits at characters that JSON strings may contain.
        for number, line in enumerate(read_text(path, what).split("\n"), start=1):
            if line.strip():
                try:
                    rows.append(parse_json(line))
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
    """Returns one pair per image, in the order in which the images first occur.

    A pair has the captions of all rows (`samples.CAPTION_NAMES`, `sentence` or `question`), and the
    rows themselves as `metadata["rows"]`. `image_column` is the row field that names the image; if
    None, it is one of `samples.IMAGE_NAMES`.
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
        by_image.setdefault(_file_name(image_name, value), []).append(row)
    items = []
    for name, rows in by_image.items():
        captions = []
        for row in rows:
            field = find_name(row, _CAPTION_FIELDS)
            captions += pick_captions(row[field], keep_repeated=True) if field else ()
        metadata = merge_captions({"rows": rows}, captions)
        items.append((name, [Pair(name, b"", captions[0] if captions else "", metadata)]))
    return picture_units(image_root or os.path.dirname(path) or ".", items)


def winoground_units(
    path: str, *, image_root: str | None = None, image_name: str = "{}.png"
) -> Units:
    """Returns both images of each Winoground example (arXiv 2204.03162), one after the other.

    The caption is the one that belongs to the image; `metadata` has `example` (row number) and
    `side` (0 or 1).
    """
    items = []
    for number, row in enumerate(read_rows(path, "Winoground's examples.jsonl")):
        check_texts(path, number, row, ("image_0", "image_1", "caption_0", "caption_1"))
        for side in (0, 1):
            metadata = {"example": number, "side": side}
            pair = Pair(f"{number}_{side}", b"", row[f"caption_{side}"], metadata)
            items.append((_file_name(image_name, row[f"image_{side}"]), [pair]))
    return picture_units(image_root or join(os.path.dirname(path), "images"), items)


def winogavil_units(
    path: str, *, image_root: str | None = None, image_name: str = "{}.jpg"
) -> Units:
    """Reads WinoGAViL (arXiv 2207.12576): a csv of games, each with a cue and candidate images.

    An image that occurs in several games is one pair. Its `metadata["games"]` lists its games, with
    `game` (row number), `cue`, `is_association` (whether the cue goes with the image) and the
    number of `candidates`.
    """
    games: dict[str, list[dict[str, Any]]] = {}
    for number, row in enumerate(read_csv(path, "WinoGAViL's winogavil_dataset.csv")):
        candidates = _read_images(path, number, row, "candidates")
        associations = _read_images(path, number, row, "associations")
        is_part = set(associations) < set(candidates)
        if not row.get("cue") or not associations or not is_part:
            raise ValueError(
                f"{path}: row {number}: expected a cue, and associations that are some of the "
                "candidates"
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
    pairs = [Pair(name, b"", "", {"games": own}) for name, own in games.items()]
    return picture_units(root, [(_file_name(image_name, pair.key), [pair]) for pair in pairs])


def _file_name(image_name: str, image: str | int) -> str:
    try:
        return image_name.format(image)
    except (LookupError, ValueError, AttributeError) as error:
        raise ValueError(
            f"image_name={image_name}: expected '{{}}' where the image {image!r:.80} goes, such as "
            f"'{{}}.jpg' ({type(error).__name__}: {error})"
        ) from error


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


_SUBSETS = "add_att add_obj replace_att replace_obj replace_rel swap_att swap_obj"
SUGARCREPE_SUBSETS = tuple(_SUBSETS.split())
# ARO's code leaves pairs of attributes with fewer test cases out of the macro accuracy.
FEWEST_OF_ATTRIBUTES = 25
# Symmetric relations that ARO's notebook "Replicate ARO!" leaves out of the macro accuracy.
UNCOUNTED_RELATIONS = frozenset(
    pathlib.Path(__file__).with_name("aro_symmetric.txt").read_text("utf-8").splitlines()
)

# Maps boxes of a picture (None: the whole picture) to their questions.
_Questions = dict[Box | None, list[dict[str, Any]]]


def sugarcrepe_units(path: str, *, image_root: str | None = None) -> Units:
    """Returns the pictures of SugarCrepe (arXiv 2306.14610), each once, with its questions.

    Args:
        path: one of the seven files, or the folder of all; each file is then a group.
        image_root: folder of COCO's val2017, or its URL; `val2017` next to the files by default.
    """
    is_file = path.endswith(".json")
    subsets = {name: join(path, f"{name}.json") for name in SUGARCREPE_SUBSETS}
    by_picture: dict[str, _Questions] = {}
    for group, file in {None: path}.items() if is_file else subsets.items():
        what = "a JSON object of numbered questions, such as SugarCrepe's add_att.json"
        for number, row in read_json(file, dict, what).items():
            check_texts(file, number, row, ("filename", "caption", "negative_caption"))
            question = {"captions": [row["caption"], row["negative_caption"]], "group": group}
            by_picture.setdefault(row["filename"], {None: []})[None].append(question)
    folder = os.path.dirname(path) or "." if is_file else path
    return _picture_units(by_picture, image_root or join(folder, "val2017"))


def aro_units(path: str, *, image_root: str | None = None) -> Units:
    """Returns the pictures of a file of ARO (arXiv 2210.01936), cropped to boxes, with questions.

    Args:
        path: `visual_genome_relation.json`, `visual_genome_attribution.json`, or the test cases of
            an order, which ARO's code generates at run time, as a JSON list of
            {"image": ..., "caption_options": [the right one, shuffled ones]}.
        image_root: folder of the pictures, or its URL; by default `images` next to a file of Visual
            Genome, and the file's own folder for an order.
    """
    rows = read_rows(path, "one of ARO's files, such as visual_genome_relation.json")
    is_order = bool(rows) and "caption_options" in rows[0]
    find_group = _groups_of(rows)
    by_picture: dict[str, _Questions] = {}
    for number, row in enumerate(rows):
        check_texts(path, number, row, ("image",) if is_order else _TEXTS)
        if is_order:
            picture, box, captions = row["image"], None, row.get("caption_options")
            is_list = isinstance(captions, list) and len(captions) > 1
            if not (is_list and all(isinstance(caption, str) for caption in captions)):
                raise ValueError(f"{path}: row {number}: expected texts as caption_options")
        else:
            picture, box = row["image_path"], _box_of(path, number, row)
            captions = [row["true_caption"], row["false_caption"]]
        question = {"captions": captions, "group": find_group(row)}
        by_picture.setdefault(picture, {}).setdefault(box, []).append(question)
    folder = os.path.dirname(path) or "."
    return _picture_units(
        by_picture, image_root or (folder if is_order else join(folder, "images"))
    )


_TEXTS = ("image_path", "true_caption", "false_caption")


def _groups_of(rows: Sequence[Mapping[str, Any]]) -> Callable[[Mapping[str, Any]], str | None]:
    """Returns a function that maps a row to its group for ARO's macro accuracy."""

    def name(row: Mapping[str, Any]) -> str | None:
        if isinstance(row.get("attributes"), list):
            return "_".join(str(attribute) for attribute in row["attributes"][:2])
        relation = row.get("relation_name")
        return None if relation in UNCOUNTED_RELATIONS else relation

    sizes = collections.Counter(name(row) for row in rows if "attributes" in row)
    few = {group for group, size in sizes.items() if size < FEWEST_OF_ATTRIBUTES}
    return lambda row: None if name(row) in few else name(row)


def _box_of(path: str, number: int, row: Mapping[str, Any]) -> Box:
    sides: list[Any] = [row.get(f"bbox_{side}") for side in "xywh"]
    left, top, width, height = sides
    is_box = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    if not is_box or width < 1 or height < 1:
        raise ValueError(
            f"{path}: row {number}: expected whole numbers of pixels as bbox_x, bbox_y, bbox_w "
            f"and bbox_h, got {sides!r:.80}"
        )
    return left, top, left + width, top + height


def _picture_units(by_picture: Mapping[str, _Questions], root: str) -> Units:
    """Returns pairs with `metadata["questions"]`, as `protocols.caption_choice` expects."""
    items = []
    for name, boxes in by_picture.items():
        pairs = []
        for box, questions in boxes.items():
            metadata = {"picture": name, "questions": questions}
            caption = questions[0]["captions"][0]
            if box is None:
                pairs.append(Pair(name, b"", caption, metadata))
            else:
                key = f"{name}[{','.join(str(side) for side in box)}]"
                pairs.append(CroppedPair(key, b"", caption, metadata, box=box))
        items.append((name, pairs))
    return picture_units(root, items)
