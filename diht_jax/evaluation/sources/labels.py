"""Pictures with one label (lists, ObjectNet, folders in a store) or several (VOC, Open Images)."""

from __future__ import annotations

import csv
import posixpath
import re
from typing import Any

from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.sources.files import Item, picture_units, read_csv, read_json, read_text
from diht_jax.readers import registry
from diht_jax.readers.base import (
    FOLDER_EXTENSIONS,
    IMAGE_EXTENSIONS,
    UNSUPPORTED_EXTENSIONS,
    Skipped,
)
from diht_jax.readers.image_folder import check_classes
from diht_jax.records.samples import clean_text
from diht_jax.records.schema import Pair
from diht_jax.storage.files import find_inputs, is_glob, join, list_names
from diht_jax.storage.stores import open_system

_CLIP_SUFFIX = ".avi"
_LIST_HEADER = "path"


def list_units(path: str, *, image_root: str | None = None, splits: str | None = None) -> Units:
    """Returns the pictures of one list, or of several; each picture occurs once.

    Such lists are Birdsnap's `test_images.txt` (a header "path", then lines such as
    "Acadian_Flycatcher/299764.jpg") and UCF-101's `testlist01.txt` (lines CLASS/CLIP.avi). A clip
    stands for a picture of the same name, which users make from its middle frame.

    Args:
        path: list file; with `splits` its name has a format field for the number, such as
            "testlist{:02}.txt".
        image_root: folder of the pictures; the folder of the list by default.
        splits: comma-separated numbers of test splits.
    """
    items: list[Item] = []
    for name, members in _read_lists(path, splits).items():
        stem, suffix = posixpath.splitext(name)
        class_name = name.split("/", 1)[0]
        metadata: dict[str, Any] = {"class_name": class_name}
        if splits is not None:
            metadata["splits"] = members
        file = f"{stem}.{IMAGE_EXTENSIONS[0]}" if suffix.lower() == _CLIP_SUFFIX else name
        items.append((file, [Pair(name, b"", class_name.replace("_", " "), metadata)]))
    return picture_units(image_root or posixpath.dirname(path) or ".", items)


def list_class_names(
    path: str, *, image_root: str | None = None, splits: str | None = None
) -> tuple[str, ...]:
    """Returns the sorted folder names, with "_" as a space, even if their pictures are missing."""
    folders = sorted({name.split("/", 1)[0] for name in _read_lists(path, splits)})
    return tuple(folder.replace("_", " ") for folder in folders)


def _read_lists(path: str, splits: str | None) -> dict[str, list[int]]:
    """Maps each picture to the numbers of the lists that contain it, in list order."""
    if splits is None:
        return dict.fromkeys(_read_list(path), [])
    if not re.fullmatch(r"[1-9]\d?(,[1-9]\d?)*", splits):
        raise ValueError(f"splits={splits}: expected numbers, such as 1 or 1,2,3")
    numbers = sorted({int(number) for number in splits.split(",")})
    has_field = re.fullmatch(r"[^{}]*\{0?(:0?\d?d?)?\}[^{}]*", path)
    if len(numbers) > 1 and not has_field:
        raise ValueError(
            f"{path}: expected one field for the number of the split in the name of the list, such "
            "as 'testlist{:02}.txt'"
        )
    members: dict[str, list[int]] = {}
    for number in numbers:
        for name in _read_list(path.format(number) if has_field else path):
            members.setdefault(name, []).append(number)
    return members


def _read_list(path: str) -> list[str]:
    lines = [line.strip() for line in read_text(path).splitlines()]
    # UCF-101's training lists have the class number after each clip.
    names = [re.sub(r"\s+\d+$", "", line) for line in lines if line and line != _LIST_HEADER]
    names = [posixpath.normpath(name) for name in names]  # "./Archery/..." has class Archery
    bad = next((n for n in names if "/" not in n or n.partition("/")[0] in ("", "..")), None)
    if bad is not None or not names:
        raise ValueError(
            f"{path}: expected one picture a line, such as 'Archery/v_Archery_g01_c01.avi', "
            + ("the list is empty" if bad is None else f"got '{bad[:99]}'")
        )
    return list(dict.fromkeys(names))


def objectnet_units(folder: str) -> Units:
    """Returns the pictures below `images` of the 113 classes that ObjectNet shares with ImageNet.

    The red border of two pixels around each picture is kept.
    """
    images = join(folder, "images")
    items: list[Item] = []
    for label, (name, _) in enumerate(_shared_classes(folder)):
        pictures = list_names(join(images, name), wanted=lambda file: file[0] != ".")
        if not pictures:
            raise ValueError(f"no pictures in '{join(images, name)}', a class of ObjectNet")
        for picture in pictures:
            file = f"{name}/{picture}"
            items.append((file, [Pair(file, b"", "", {"label": label})]))
    return picture_units(images, items)


def objectnet_class_names(folder: str) -> tuple[str, ...]:
    """Returns the names of the shared classes in folder order, lower case as in CLIP_benchmark."""
    return tuple(label.lower() for _, label in _shared_classes(folder))


def _shared_classes(folder: str) -> list[tuple[str, str]]:
    """Returns (folder, ObjectNet's name) of each class that is also in ImageNet."""
    names = _read_mapping(join(folder, "mappings", "folder_to_objectnet_label.json"))
    shared = _read_mapping(join(folder, "mappings", "objectnet_to_imagenet_1k.json"))
    unknown = sorted(set(shared) - set(names.values()))
    if unknown or not shared:
        raise ValueError(f"{folder}: its two mappings have different classes: {unknown[:5]}")
    return sorted((name, label) for name, label in names.items() if label in shared)


def _read_mapping(path: str) -> dict[str, str]:
    mapping = read_json(path, dict, "ObjectNet's mapping of classes, a JSON object of texts")
    if not all(isinstance(value, str) for value in mapping.values()):
        raise ValueError(f"{path}: expected a JSON object of texts")
    return mapping


def stored_class_units(url: str) -> Units | None:
    """Returns the pictures of a folder of classes in a store, like `readers.image_folder`.

    The sorted sub-folders are the classes, numbered from 0. The order of the pictures and the
    errors are those of a local folder. None if the URL is no such folder: a reader handles it or a
    file in it, or no sub-folder has a picture.
    """
    root = url.rstrip("/")
    if _is_read_otherwise(url) or any(
        _is_read_otherwise(path, is_named=False) for path in find_inputs(root)
    ):
        return None
    system, path = open_system(root)
    start = len(system.unstrip_protocol(path).rstrip("/")) + 1
    files = [tuple(found[start:].split("/")) for found in find_inputs(join(root, "*", "**"))]
    files = [parts for parts in files if not any(part.startswith(".") for part in parts)]
    label_of = {name: label for label, name in enumerate(sorted({parts[0] for parts in files}))}
    extensions = (*FOLDER_EXTENSIONS, *UNSUPPORTED_EXTENSIONS)
    pictures = [p for p in sorted(files) if p[-1].rpartition(".")[2].lower() in extensions]
    check_classes(url, pictures)
    items: list[Item] = []
    for parts in pictures:
        extension = parts[-1].rpartition(".")[2].lower()
        class_name = clean_text(parts[0])
        key = clean_text("/".join([class_name, *parts[1:]]))
        caption = " ".join(class_name.replace("_", " ").split()) or class_name
        metadata = {"label": label_of[parts[0]], "class_name": class_name}
        entry: list[Pair] | Skipped = [Pair(key, b"", caption, metadata)]
        if extension not in FOLDER_EXTENSIONS:
            detail = f"expected one of {', '.join(FOLDER_EXTENSIONS)}"
            entry = Skipped(key, "unsupported_format", detail)
        items.append(("/".join(parts), entry))
    return picture_units(root, items) if items else None


def _is_read_otherwise(url: str, *, is_named: bool = True) -> bool:
    is_known = any(form.is_file(url, is_named=is_named) for form in registry.FORMATS.values())
    return is_known or is_glob(open_system(url)[1])


# In the devkit's order, which is alphabetical.
_VOC_CLASSES = """
    aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person
    pottedplant sheep sofa train tvmonitor
"""
VOC_CLASSES = tuple(_VOC_CLASSES.split())
_VOC_STATES = {"1": "labels", "0": "ignored_labels", "-1": None}

# Maps a metadata field to the class numbers of an image.
_Labels = dict[str, list[int]]


def voc_units(folder: str) -> Units:
    """Returns the test images of VOC 2007, or of another year with the same files.

    The folder, such as VOCdevkit/VOC2007, has ImageSets/Main/CLASS_test.txt and JPEGImages. If all
    objects of a class are marked as difficult (0 in the list of the class), the image does not
    count for the class, as in the devkit: `metadata["ignored_labels"]`.
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
    """Returns the validation images of Open Images with their verified image-level labels.

    Our own rule: an image only counts for classes whose presence or absence people have verified,
    a handful of 601: `metadata["counted_labels"]`.
    """
    numbers = {mid: number for number, (mid, _) in enumerate(_open_images_classes(folder))}
    path = join(folder, "validation-annotations-human-imagelabels-boxable.csv")
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
    return _units(join(folder, "validation"), images)


def open_images_class_names(folder: str) -> tuple[str, ...]:
    """Returns the 601 names of the boxable classes, in file order."""
    return tuple(name for _, name in _open_images_classes(folder))


def _open_images_classes(folder: str) -> list[tuple[str, str]]:
    """Returns (label, name) of each class; only V7 starts with a line of column names."""
    path = join(folder, "class-descriptions-boxable.csv")
    found = read_csv(path, "Open Images' names of the boxable classes", csv.reader)
    rows = [tuple(row) for row in found if row]
    rows = [row for row in rows if row != ("LabelName", "DisplayName")]
    if not rows or any(len(row) != 2 for row in rows):
        raise ValueError(f"{path}: expected lines such as '/m/011k07,Tortoise'")
    return rows


def _units(root: str, images: dict[str, _Labels]) -> Units:
    items = [(f"{name}.jpg", [Pair(name, b"", "", labels)]) for name, labels in images.items()]
    return picture_units(root, items)
