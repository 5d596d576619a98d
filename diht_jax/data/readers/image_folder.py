"""A folder with one sub-folder of images per class.

Called through `readers.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from diht_jax.data.readers.base import (
    MAX_IMAGE_BYTES,
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
        if os.path.getsize(path) > MAX_IMAGE_BYTES:
            yield Skipped(key, "too_large", f"over {MAX_IMAGE_BYTES} bytes")
            continue
        with open(path, "rb") as file:
            yield Pair(key, file.read(), caption, metadata)
