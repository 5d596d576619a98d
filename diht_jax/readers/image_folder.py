"""Folders of images: one sub-folder for each class, or pictures without any caption.

A link may lead to any file inside of the folder that was named, and to none outside of it.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator

from diht_jax.readers.base import (
    FOLDER_EXTENSIONS,
    Format,
    Skipped,
    SourceShard,
    read_image,
    walk_images,
)
from diht_jax.records.samples import clean_text
from diht_jax.records.schema import Pair


def list_class_shards(root: str) -> list[SourceShard]:
    """One shard per class, in the order of the labels; empty where `root` has no such folders.

    Args:
        root: its visible sub-folders are the classes; their sorted order numbers them from 0.
    """
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    folders = [os.path.join(root, name) for name in names]
    if not any(any(walk_images(folder, root)) for folder in folders):
        return []
    return [
        SourceShard("folder", folder, options={"label": label, "class_name": name})
        for label, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]


def read_class(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the images of one class; the caption is the class name in words."""
    class_name = clean_text(shard.options["class_name"])
    metadata = {"label": shard.options["label"], "class_name": class_name}
    caption = " ".join(class_name.replace("_", " ").split()) or class_name
    for path, reason in walk_images(shard.path, shard.root):
        name = os.path.relpath(path, shard.path)
        key = clean_text(class_name if name == "." else f"{class_name}/{name}")
        yield _read_image(path, shard.root, reason, Pair(key, b"", caption, metadata))


def read_pictures(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the images of a folder with empty captions; keys are their paths in it."""
    yield from read_listed(shard.path, list_pictures(shard.path))


def list_pictures(folder: str) -> Iterator[tuple[str, str, str | None]]:
    """Path, key, and the reason for which it cannot be read or None, of each image of a folder."""
    for path, reason in walk_images(folder, folder):
        yield path, os.path.relpath(path, folder), reason


def read_listed(
    folder: str, listed: Iterable[tuple[str, str, str | None]]
) -> Iterator[Pair | Skipped]:
    """Yields the images that `list_pictures` listed, with empty captions."""
    for path, key, reason in listed:
        yield _read_image(path, folder, reason, Pair(key, b"", ""))


def _read_image(path: str, root: str, reason: str | None, pair: Pair) -> Pair | Skipped:
    """The pair with its image, or why there is none."""
    if reason == "refused_path":
        return Skipped(pair.key, reason, f"a link that leads out of '{root}'")
    if reason is not None:
        return Skipped(pair.key, reason, f"expected one of {', '.join(FOLDER_EXTENSIONS)}")
    image = read_image(os.path.realpath(root), os.path.realpath(path), pair.key)
    return image if isinstance(image, Skipped) else dataclasses.replace(pair, image=image)


def _count_images(shard: SourceShard) -> int:
    return sum(1 for _ in walk_images(shard.path, shard.root))


CLASSES = Format(
    is_folder=True,
    list_shards=lambda root, options: list_class_shards(root),
    read=read_class,
    count=_count_images,
)
# Nothing is recognised as this: without captions it is no source of pairs, but it can be embedded.
PICTURES = Format(read=read_pictures, count=_count_images)
