"""Folders of images: one sub-folder for each class, or pictures without any caption."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from diht_jax.data.readers.base import (
    MAX_IMAGE_BYTES,
    Format,
    Skipped,
    SourceShard,
    clean_text,
    image_files,
)
from diht_jax.data.records.schema import Pair


def list_class_shards(root: str) -> list[SourceShard]:
    """One shard per class, in the order of the labels; empty where `root` has no such folders.

    Args:
        root: its visible sub-folders are the classes; their sorted order numbers them from 0.
    """
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    folders = [os.path.join(root, name) for name in names]
    if not any(image_files(folder) for folder in folders):
        return []
    return [
        SourceShard("folder", folder, options={"label": label, "class_name": name})
        for label, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]


def read_class(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the images of one class; the caption is the class name in words.

    Args:
        shard: as `list_class_shards` gives.
    """
    class_name = clean_text(shard.options["class_name"])
    metadata = {"label": shard.options["label"], "class_name": class_name}
    caption = " ".join(class_name.replace("_", " ").split()) or class_name
    for path in image_files(shard.path):
        key = clean_text(f"{class_name}/{os.path.relpath(path, shard.path)}")
        yield _read_image(path, key, caption, metadata)


def read_pictures(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the images of a folder with empty captions; keys are their paths in it."""
    for path in image_files(shard.path):
        yield _read_image(path, os.path.relpath(path, shard.path), "", {})


def _read_image(path: str, key: str, caption: str, metadata: dict[str, Any]) -> Pair | Skipped:
    if os.path.getsize(path) > MAX_IMAGE_BYTES:
        return Skipped(key, "too_large", f"over {MAX_IMAGE_BYTES} bytes")
    with open(path, "rb") as file:
        return Pair(key, file.read(), caption, metadata)


def _count_images(shard: SourceShard) -> int:
    return len(image_files(shard.path))


CLASSES = Format(
    is_folder=True,
    list_shards=lambda root, options: list_class_shards(root),
    read=read_class,
    count=_count_images,
)
# Nothing is recognised as this: without captions it is no source of pairs, but it can be embedded.
PICTURES = Format(read=read_pictures, count=_count_images)
