"""Images with captions of which one is right: `sugarcrepe:PATH` and `aro:FILE`.

SugarCrepe (arXiv 2306.14610) has seven JSON files: {"0": {"filename": "000000544519.jpg",
"caption": ..., "negative_caption": ...}, ...}, on COCO's val2017.

ARO (arXiv 2210.01936) has JSON lists. Those of Visual Genome have a box of each picture
(`image_path`, `bbox_x`, `bbox_y`, `bbox_w`, `bbox_h`), a `true_caption` and a `false_caption`, and
`relation_name` or two `attributes`. Its orders are made when its code is run; kept as JSON, each
test case is {"image": ..., "caption_options": [the right one, shuffled ones]}.
"""

from __future__ import annotations

import collections
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diht_jax.evaluation.embedding.entries import Box, CroppedPair, Units
from diht_jax.evaluation.sources.annotations import read_rows
from diht_jax.evaluation.sources.pictures import picture_units
from diht_jax.evaluation.sources.text_files import check_texts, read_json
from diht_jax.records.schema import Pair
from diht_jax.storage.files import join

SUGARCREPE_SUBSETS = (
    "add_att",
    "add_obj",
    "replace_att",
    "replace_obj",
    "replace_rel",
    "swap_att",
    "swap_obj",
)
# Pairs of attributes with fewer test cases count for no macro accuracy in ARO's code.
FEWEST_OF_ATTRIBUTES = 25
# Relations that ARO's notebook "Replicate ARO!" leaves out of the macro accuracy as symmetric.
UNCOUNTED_RELATIONS = frozenset(
    pathlib.Path(__file__).with_name("aro_symmetric.txt").read_text("utf-8").splitlines()
)

# Boxes of a picture (None: the whole), each with its questions.
_Questions = dict[Box | None, list[dict[str, Any]]]


def sugarcrepe_units(path: str, *, image_root: str | None = None) -> Units:
    """The pictures of SugarCrepe, each once, with the questions on it.

    Args:
        path: one of the seven files, or a folder that holds them all: then the subsets are groups.
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
    """The pictures of a file of ARO, cut to their boxes, with the questions on each box.

    Args:
        path: `visual_genome_relation.json`, `visual_genome_attribution.json`, or test cases of an
            order.
        image_root: folder of the pictures, or its URL; by default `images` next to a file of Visual
            Genome, the folder itself of an order.
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
    """Makes a function that finds the group of a row for ARO's macro accuracy."""

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
    """Pairs with `metadata["questions"]`, as `protocols.caption_choice` takes them."""
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
