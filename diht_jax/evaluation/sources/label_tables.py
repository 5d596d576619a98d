"""Several labels an image, as PASCAL VOC (`voc:DIR`) and Open Images (`open_images:DIR`) have them.

In both an image can count neither way for a class: in VOC, where all its objects of the class are
marked as difficult (0 in the list of the class, which the devkit's own evaluation of the
classification leaves out as well): these classes are `metadata["ignored_labels"]`. In Open Images
(ours), where nobody has verified whether the class is there: the others are
`metadata["counted_labels"]`, a handful of 601.
"""

from __future__ import annotations

import csv

from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.sources.pictures import picture_units
from diht_jax.evaluation.sources.text_files import read_csv, read_text
from diht_jax.records.schema import Pair
from diht_jax.storage.files import join

# In the devkit's order, the one of the alphabet.
VOC_CLASSES = (
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
)
_VOC_STATES = {"1": "labels", "0": "ignored_labels", "-1": None}

_OPEN_IMAGES_LABELS = "validation-annotations-human-imagelabels-boxable.csv"
_OPEN_IMAGES_CLASSES = "class-descriptions-boxable.csv"
_OPEN_IMAGES_PICTURES = "validation"


# Metadata field -> numbers of classes of an image.
_Labels = dict[str, list[int]]


def voc_units(folder: str) -> Units:
    """The test images of VOC 2007, or of another year with the same files.

    Args:
        folder: such as VOCdevkit/VOC2007, with ImageSets/Main/CLASS_test.txt and JPEGImages.
    """
    images: dict[str, _Labels] = {}
    for number, name in enumerate(VOC_CLASSES):
        path = join(folder, "ImageSets", "Main", f"{name}_test.txt")
        what = "VOC's list of a class; unpack VOCtest_06-Nov-2007.tar"
        for line in read_text(path, what).splitlines():
            image, _, state = line.strip().partition(" ")
            if state.strip() not in _VOC_STATES:
                raise ValueError(f"{path}: expected 'IMAGE 1', 'IMAGE 0' or 'IMAGE -1': '{line}'")
            into = _VOC_STATES[state.strip()]
            found = images.setdefault(image, {"labels": [], "ignored_labels": []})
            if into is not None:
                found[into].append(number)
    return _units(join(folder, "JPEGImages"), images)


def open_images_units(folder: str) -> Units:
    """The validation images of Open Images with their verified image-level labels."""
    numbers = {mid: number for number, (mid, _) in enumerate(_open_images_classes(folder))}
    path = join(folder, _OPEN_IMAGES_LABELS)
    images: dict[str, _Labels] = {}
    for row in read_csv(path, "Open Images' verified labels"):
        try:
            image, number = row["ImageID"], numbers.get(row["LabelName"])
            is_there = float(row["Confidence"]) == 1
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected the columns ImageID, LabelName and Confidence ({error!r})"
            ) from error
        if number is not None:
            found = images.setdefault(image, {"labels": [], "counted_labels": []})
            found["counted_labels"].append(number)
            if is_there:
                found["labels"].append(number)
    return _units(join(folder, _OPEN_IMAGES_PICTURES), images)


def open_images_class_names(folder: str) -> tuple[str, ...]:
    """The 601 names of the boxable classes, in the order of their file."""
    return tuple(name for _, name in _open_images_classes(folder))


def _open_images_classes(folder: str) -> list[tuple[str, str]]:
    """(label, name) of each class; V7 has a line of column names, older versions have not."""
    path = join(folder, _OPEN_IMAGES_CLASSES)
    found = read_csv(path, "Open Images' names of the boxable classes", csv.reader)
    rows = [tuple(row) for row in found if row]
    rows = [row for row in rows if row != ("LabelName", "DisplayName")]
    if not rows or any(len(row) != 2 for row in rows):
        raise ValueError(f"{path}: expected lines such as '/m/011k07,Tortoise'")
    return rows


def _units(root: str, images: dict[str, _Labels]) -> Units:
    items = [(f"{name}.jpg", [Pair(name, b"", "", labels)]) for name, labels in images.items()]
    return picture_units(root, items)
