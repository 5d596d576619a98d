"""Folders of images: with captions in text files, with one sub-folder per class, or with neither.

A caption is in a file of the same name, as in an unpacked webdataset tar: `NAME.jpg`, `NAME.txt`
and `NAME.json` are a pair. Sub-folders are read too, since img2dataset's output format "files" has
one for each shard.

Pictures of a class must be directly in its folder. Deeper pictures are an error, since the folders
above them could be splits (train, val), super-classes or dates rather than the intended classes.

A link may lead to any file inside the source folder, but to no file outside of it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from diht_jax.readers.base import (
    FOLDER_EXTENSIONS,
    UNSUPPORTED_EXTENSIONS,
    Format,
    Skipped,
    SourceShard,
    read_image,
    walk_files,
    walk_images,
    warn_of_loop,
)
from diht_jax.records.samples import Pair, clean_text
from diht_jax.records.tars import TEXT_EXTENSIONS, Sample, make_pair

_SPLITS = frozenset(
    ["train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"]
)
_PICTURES = (*FOLDER_EXTENSIONS, *UNSUPPORTED_EXTENSIONS)
_SAMPLES_PER_SHARD = 10_000
_STATS = "_stats.json"  # img2dataset's statistics of the folder next to it


class FolderLayoutError(ValueError):
    """The sub-folders of a folder are not the classes of its pictures."""


@dataclasses.dataclass(frozen=True)
class FolderOptions:
    """Options of a folder."""

    split: str | None = None  # sub-folder to read instead of the folder, such as "train"


def _refuse_splits(root: str, names: Collection[str]) -> None:
    """Raises FolderLayoutError if all sub-folders with pictures are named like splits."""
    if names and all(name.lower() in _SPLITS for name in names):
        raise FolderLayoutError(
            f"folder '{root}': its sub-folders ({', '.join(sorted(names))}) are splits, no classes;"
            f" read one by '{root}?split={min(names)}', with captions or a folder for each class"
        )


def list_sample_shards(root: str) -> list[SourceShard]:
    """Divides folders with pictures into parts; empty if no picture has a text of the same name.

    Raises:
        FolderLayoutError: the sub-folders are splits.
    """
    shards, below_root, has_captions = [], set(), False
    for folder in sorted({os.path.dirname(path) for path, _ in walk_files(root, root)}):
        below = os.path.relpath(folder, root).removeprefix(".")
        samples = _list_samples(folder)
        below_root |= {below.split(os.sep)[0]} if samples else set()
        for names in samples.values():
            extensions = {_extension(name) for name in names}
            has_captions |= "txt" in extensions and not extensions.isdisjoint(FOLDER_EXTENSIONS)
        for start in range(0, len(samples), _SAMPLES_PER_SHARD):
            stop = min(start + _SAMPLES_PER_SHARD, len(samples))
            shards.append(SourceShard("caption_files", folder, start, stop, {"below_root": below}))
    if not has_captions:
        return []
    _refuse_splits(root, below_root)
    return shards


def read_samples(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of a part of a folder; keys are paths below the root without extension.

    `tars.make_pair` defines the meaning of the files. Texts must be UTF-8.
    """
    for stem, names in list(_list_samples(shard.path).items())[shard.start : shard.stop]:
        key = clean_text(os.path.join(shard.options["below_root"], stem))
        yield _read_sample(shard, key, names)


def _read_sample(shard: SourceShard, key: str, names: list[str]) -> Pair | Skipped:
    members: list[tuple[str, bytes | None]] = []
    has_picture = any(_extension(name) in FOLDER_EXTENSIONS for name in names)
    for name in names:
        extension = _extension(name)
        if extension in UNSUPPORTED_EXTENSIONS:
            if has_picture:  # such as a camera's a.arw next to a.jpg
                continue
            detail = f"expected one of {', '.join(FOLDER_EXTENSIONS)}"
            return Skipped(key, "unsupported_format", detail)
        path = os.path.join(os.path.realpath(shard.path), name)
        data = read_image(os.path.realpath(shard.root), path, key)
        if isinstance(data, Skipped):
            return data
        if extension == "txt":
            try:
                data.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                return Skipped(key, "bad_row", f"{os.path.join(shard.path, name)}: {error}")
        members.append((extension, data))
    return make_pair(Sample(0, key, members, []), FOLDER_EXTENSIONS, shard.needs_caption)


def _list_samples(folder: str) -> dict[str, list[str]]:
    """Returns stem -> names of the pictures and texts in a folder, both sorted."""
    with os.scandir(folder) as entries:
        files = (e for e in entries if not os.path.isdir(e.path.removesuffix(_STATS)))
        names = sorted(e.name for e in files if e.name[0] != ".")
    samples: dict[str, list[str]] = {}
    for name in names:
        if _extension(name) in (*_PICTURES, *TEXT_EXTENSIONS):
            samples.setdefault(name.rpartition(".")[0], []).append(name)
    return dict(sorted(samples.items()))


def _extension(name: str) -> str:
    return name.rpartition(".")[2].lower()


def check_classes(root: str, pictures: Iterable[Sequence[str]]) -> bool:
    """Returns whether there are pictures, given as parts of their paths below `root`.

    Raises:
        FolderLayoutError: a picture is deeper than class and file, or the folders are splits.
    """
    names, deep = set(), None
    for parts in pictures:
        names.add(parts[0])
        deep = deep or (parts if len(parts) > 2 else None)
    splits = sorted(name for name in names if name.lower() in _SPLITS)
    if deep is not None:
        hint = (
            f"read one split by '{root}?split={splits[0]}'"
            if splits
            else "name the folder whose sub-folders are the classes"
        )
        raise FolderLayoutError(
            f"folder '{root}': '{'/'.join(deep)}' is deeper than CLASS/PICTURE; {hint}"
        )
    _refuse_splits(root, names)
    return bool(names)


def list_class_shards(root: str) -> list[SourceShard]:
    """Returns one shard per class, in the order of the labels; empty without class folders.

    The visible sub-folders of `root` are the classes, numbered from 0 in sorted order.

    Raises:
        FolderLayoutError: pictures are deeper than one level, or the sub-folders are splits.
    """
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if os.path.isdir(e) and e.name[0] != ".")
    loops = [name for name in names if os.path.samefile(os.path.join(root, name), root)]
    for name in loops:
        warn_of_loop(os.path.join(root, name), root)
    names = [name for name in names if name not in loops]
    folders = [os.path.join(root, name) for name in names]
    found = (path for folder in folders for path, _ in walk_images(folder, root))
    if not check_classes(root, (os.path.relpath(path, root).split(os.sep) for path in found)):
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
    """Yields the images of a folder with empty captions; keys are relative paths."""
    yield from read_listed(shard.path, list_pictures(shard.path))


def list_pictures(folder: str) -> Iterator[tuple[str, str, str | None]]:
    """Yields the path, the key, and None or the reason for failing, of each image in a folder."""
    for path, reason in walk_images(folder, folder):
        # Keys must be UTF-8, but names need not be. The escapes keep different keys distinct.
        key = os.fsencode(os.path.relpath(path, folder)).decode("utf-8", "backslashreplace")
        yield path, key, reason


def find_picture(folder: str, key: str) -> str:
    """Returns the path of the picture with a key from `list_pictures`."""
    if os.path.exists(os.path.join(folder, key)):
        return os.path.join(folder, key)
    escaped = re.compile(rb"\\x([89a-f][0-9a-f])")
    name = escaped.sub(lambda match: bytes.fromhex(match[1].decode()), key.encode())
    return os.path.join(folder, os.fsdecode(name))


def read_listed(
    folder: str, listed: Iterable[tuple[str, str, str | None]]
) -> Iterator[Pair | Skipped]:
    """Yields the images listed by `list_pictures`, with empty captions."""
    for path, key, reason in listed:
        yield _read_image(path, folder, reason, Pair(key, b"", ""))


def _read_image(path: str, root: str, reason: str | None, pair: Pair) -> Pair | Skipped:
    """Returns the pair with its image, or the reason why there is none."""
    if reason == "refused_path":
        return Skipped(pair.key, reason, f"a link that leads out of '{root}'")
    if reason is not None:
        return Skipped(pair.key, reason, f"expected one of {', '.join(FOLDER_EXTENSIONS)}")
    image = read_image(os.path.realpath(root), os.path.realpath(path), pair.key)
    return image if isinstance(image, Skipped) else dataclasses.replace(pair, image=image)


def _count_images(shard: SourceShard) -> int:
    return sum(1 for _ in walk_images(shard.path, shard.root))


CAPTION_FILES = Format(
    is_folder=True,
    list_shards=lambda root, options: list_sample_shards(root),
    read=read_samples,
    count=lambda shard: shard.end - shard.start,
)
CLASSES = Format(
    is_folder=True,
    list_shards=lambda root, options: list_class_shards(root),
    options=FolderOptions,
    read=read_class,
    count=_count_images,
)
# Never recognised by itself: without captions, it is no source of pairs, but can be embedded.
PICTURES = Format(read=read_pictures, count=_count_images)
