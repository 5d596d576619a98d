"""ObjectNet as it is unpacked: `objectnet:DIR`, the classes that it shares with ImageNet.

Of its 313 classes 113 are classes of ImageNet, by its own `mappings/objectnet_to_imagenet_1k.json`;
the pictures of the others are not read. Class names are ObjectNet's in lower case, as
CLIP_benchmark has them. The red border of two pixels around each picture stays.
"""

from __future__ import annotations

import json
import os
import posixpath
from collections.abc import Sequence

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
from diht_jax.storage.files import find_inputs
from diht_jax.storage.stores import is_remote


def objectnet_units(folder: str) -> list[Unit]:
    """The pictures of the shared classes.

    Args:
        folder: such as objectnet-1.0, with `mappings` and `images`.

    Raises:
        ValueError: a mapping, or the folder of a class, is missing.
    """
    images = join(folder, "images")
    items = [
        (f"{name}/{picture}", label)
        for label, (name, _) in enumerate(_shared_classes(folder))
        for picture in _pictures(join(images, name))
    ]

    def make(item: tuple[str, int], read: ReadImage) -> Sequence[Pair | Skipped]:
        name, label = item
        image = read(name)
        return [image if isinstance(image, Skipped) else Pair(name, image, "", {"label": label})]

    return picture_units(images, items, make)


def class_names(folder: str) -> tuple[str, ...]:
    """The names of the shared classes, in the order of their folders."""
    return tuple(label.lower() for _, label in _shared_classes(folder))


def _shared_classes(folder: str) -> list[tuple[str, str]]:
    """(folder, ObjectNet's name) of each class that is one of ImageNet, too."""
    names = _read_mapping(join(folder, "mappings", "folder_to_objectnet_label.json"))
    shared = _read_mapping(join(folder, "mappings", "objectnet_to_imagenet_1k.json"))
    unknown = sorted(set(shared) - set(names.values()))
    if unknown or not shared:
        raise ValueError(f"{folder}: its two mappings have different classes: {unknown[:5]}")
    return sorted((name, label) for name, label in names.items() if label in shared)


def _read_mapping(path: str) -> dict[str, str]:
    require(path, "ObjectNet's mapping of classes, as in objectnet-1.0.zip")
    try:
        mapping = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON object ({error})") from error
    if not isinstance(mapping, dict) or not all(isinstance(v, str) for v in mapping.values()):
        raise ValueError(f"{path}: expected a JSON object of texts")
    return mapping


def _pictures(folder: str) -> list[str]:
    require(folder, "the pictures of a class of ObjectNet")
    if is_remote(folder):
        return sorted(posixpath.basename(url) for url in find_inputs(folder))
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))
