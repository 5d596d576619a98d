"""Folders of classes in an object store: the entries of `data.readers.image_folder`, by URL."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from diht_jax.evaluation.sources.pictures import ReadImage, Unit, join, picture_units
from diht_jax.readers import registry
from diht_jax.readers.base import FOLDER_EXTENSIONS, UNSUPPORTED_EXTENSIONS, Skipped, clean_text
from diht_jax.records.schema import Pair
from diht_jax.storage.files import find_inputs, is_glob
from diht_jax.storage.stores import is_remote, open_system


@dataclasses.dataclass(frozen=True)
class _Picture:
    name: str  # below the folder, such as "hot_dog/1.jpg"
    label: int


def stored_class_units(url: str) -> list[Unit] | None:
    """Units of the pictures of a folder whose sub-folders are the classes.

    The sorted sub-folders in which a file lies are numbered from 0; the order of the pictures is
    that of a local folder.

    Returns:
        None where the URL does not name such a folder: a reader knows it or a file in it, or no
        sub-folder has a picture.
    """
    pictures = _list_pictures(url)
    return None if pictures is None else picture_units(url.rstrip("/"), pictures, _make)


def count_stored_classes(url: str) -> int | None:
    """Pictures of such a folder; None as in `stored_class_units`."""
    pictures = _list_pictures(url)
    return None if pictures is None else len(pictures)


def _list_pictures(url: str) -> list[_Picture] | None:
    if not is_remote(url) or _is_read_otherwise(url):
        return None
    root = url.rstrip("/")
    if any(map(_is_read_otherwise, find_inputs(root))):
        return None
    system, path = open_system(root)
    start = len(system.unstrip_protocol(path).rstrip("/")) + 1
    files = [tuple(found[start:].split("/")) for found in find_inputs(join(root, "*", "**"))]
    files = [parts for parts in files if not any(part.startswith(".") for part in parts)]
    label_of = {name: label for label, name in enumerate(sorted({parts[0] for parts in files}))}
    pictures = [
        _Picture("/".join(parts), label_of[parts[0]])
        for parts in sorted(files)
        if _extension(parts[-1]) in (*FOLDER_EXTENSIONS, *UNSUPPORTED_EXTENSIONS)
    ]
    return pictures or None


def _is_read_otherwise(url: str) -> bool:
    is_known = any(form.is_file(url) for form in registry.FORMATS.values())
    return is_known or is_glob(open_system(url)[1])


def _make(picture: _Picture, read: ReadImage) -> Sequence[Pair | Skipped]:
    folder, _, rest = picture.name.partition("/")
    class_name = clean_text(folder)
    key = clean_text(f"{class_name}/{rest}")
    if _extension(rest) not in FOLDER_EXTENSIONS:
        detail = f"expected one of {', '.join(FOLDER_EXTENSIONS)}"
        return [Skipped(key, "unsupported_format", detail)]
    image = read(picture.name)
    if isinstance(image, Skipped):
        return [dataclasses.replace(image, key=key)]
    caption = " ".join(class_name.replace("_", " ").split()) or class_name
    return [Pair(key, image, caption, {"label": picture.label, "class_name": class_name})]


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()
