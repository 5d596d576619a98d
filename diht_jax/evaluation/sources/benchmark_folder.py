"""Data sets in the layout of CLIP_benchmark: tars with labels, class names and templates.

The layout is that of CLIP_benchmark 1.6, `clip_benchmark/datasets/builder.py`:

    DIR/SPLIT/0.tar, 1.tar, ...      KEY.jpg (png, webp) with KEY.cls (a number), KEY.npy (0 and 1
    DIR/SPLIT/nshards.txt            for each class) or KEY.txt (captions, one a line)
    DIR/classnames.txt               one a line, in label order
    DIR/zeroshot_classification_templates.txt   one a line, with "{c}" for the class name
    DIR/dataset_type.txt             "retrieval", "multilabel"; without it "classification"

A KEY.npy next to a KEY.cls holds numbers about the picture, such as where and when it was taken, as
in DataComp's versions of WILDS, GeoDE and Dollar Street. DIR may be a URL.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.protocols.base import CLASS_SLOT, check_class_names, check_templates
from diht_jax.evaluation.sources.files import read_text
from diht_jax.evaluation.suite import CLASSIFICATION, MULTILABEL, RETRIEVAL
from diht_jax.readers.array_files import parse_npy
from diht_jax.readers.base import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, Skipped, SourceShard
from diht_jax.readers.shard_formats import count_images
from diht_jax.records import tars
from diht_jax.records.samples import merge_captions, pick_captions
from diht_jax.records.schema import Pair
from diht_jax.storage.files import exists, join, list_names

DEFAULT_SPLIT = "test"

_NOTE_OF_TYPE = {CLASSIFICATION: "cls", MULTILABEL: "npy", RETRIEVAL: "txt"}
_LARGEST_NOTE_BYTES = 2**24


def open_benchmark_folder(text: str) -> tuple[Units, dict[str, Any]]:
    """Opens a data set without reading an image.

    Pairs have no caption, except for retrieval. For classification, `metadata["label"]` is an int
    and `metadata["numbers"]` lists the values of the KEY.npy, if any. For a multi-label set,
    `metadata["labels"]` lists the class numbers, and `metadata["ignored_labels"]` the classes for
    which the image does not count. A damaged archive is a ValueError.

    Args:
        text: "DIR[:SPLIT]"; DIR may be a URL.

    Returns:
        One unit per shard; and the task fields that the data defines: `kind`, and `class_names`
        and `templates` if the folder has them.

    Raises:
        ValueError: the folder has another layout, or shards are missing.
    """
    folder, _, split = text.rpartition(":")
    if not folder or "/" in split:  # no colon, or the colon of a URL
        folder, split = text, ""
    paths = _list_tars(folder, split or DEFAULT_SPLIT)
    type_file = join(folder, "dataset_type.txt")
    kind = "".join(_read_lines(type_file)).lower() if exists(type_file) else CLASSIFICATION
    if kind not in _NOTE_OF_TYPE:
        known = ", ".join(_NOTE_OF_TYPE)
        raise ValueError(f"{type_file}: expected one of {known}, got '{kind[:99]}'")

    def count() -> int | None:
        """Estimates the number of pictures from the first tar; None for tars in a store."""
        first = count_images(SourceShard("webdataset", paths[0]))
        return None if first is None else first * len(paths)

    units = Units([functools.partial(_read_shard, path, kind) for path in paths], count)
    words: dict[str, Any] = {"kind": kind}
    if kind == RETRIEVAL:  # has no class names or templates, whose files may be empty
        return units, words
    classes = join(folder, "classnames.txt")
    if exists(classes):
        words["class_names"] = check_class_names(_read_lines(classes), classes)
    templates = join(folder, "zeroshot_classification_templates.txt")
    if exists(templates):
        lines = [line.replace("{c}", CLASS_SLOT) for line in _read_lines(templates) if line]
        try:
            words["templates"] = check_templates(lines)
        except ValueError as error:
            raise ValueError(f"{templates}: {str(error)[:500]}") from error
    return units, words


def _list_tars(folder: str, split: str) -> list[str]:
    """Lists the shards of a split; `nshards.txt` states their number."""
    count_file = join(folder, split, "nshards.txt")
    if not exists(count_file):
        raise ValueError(
            f"{folder}: expected CLIP_benchmark's layout, but there is no {split}/nshards.txt"
        )
    text = "".join(_read_lines(count_file))
    count = int(text) if re.fullmatch("[0-9]{1,6}", text) else 0
    if not count:
        raise ValueError(f"{count_file}: expected the number of shards, got '{text[:99]}'")
    names = [f"{number}.tar" for number in range(count)]
    present = set(list_names(join(folder, split)))
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(
            f"{join(folder, split)}: {len(missing)} of {count} shards are missing: "
            f"{', '.join(missing[:5])}"
        )
    return [join(folder, split, name) for name in names]


def _read_shard(path: str, kind: str) -> Iterator[Pair | Skipped]:
    seen: set[str] = set()
    for sample in tars.group_members(tars.read_members(path, _size_limit)):
        if sample.key in seen:
            yield Skipped(sample.key, "duplicate", "the key was there before")
        else:
            seen.add(sample.key)
            yield _make_pair(sample.key, sample.members, kind)


def _read_lines(path: str) -> list[str]:
    return [line.strip() for line in read_text(path).rstrip().splitlines()]


def _make_pair(key: str, members: list[tuple[str, bytes | None]], kind: str) -> Pair | Skipped:
    names = [extension for extension, _ in members]
    images = [data for extension, data in members if extension in IMAGE_EXTENSIONS]
    note_name = _NOTE_OF_TYPE[kind]
    if len(images) != 1 or names.count(note_name) > 1:
        reason = "duplicate" if images else "no_image"
        return Skipped(key, reason, f"found {', '.join(names)}")
    if images[0] is None:
        return Skipped(key, "too_large", f"an image file of over {MAX_IMAGE_BYTES} bytes")
    note = dict(members).get(note_name)
    if note is None:
        reason = "no_caption" if kind == RETRIEVAL else "bad_row"
        return Skipped(key, reason, f"no {note_name} to be read among {', '.join(names)}")
    if kind == RETRIEVAL:
        lines = note.decode("utf-8-sig", "replace").splitlines()
        captions = pick_captions(lines, keep_repeated=True)
        if not captions:
            return Skipped(key, "no_caption", "the txt is blank")
        return Pair(key, images[0], captions[0], merge_captions({}, captions))
    try:
        if kind == MULTILABEL:
            return Pair(key, images[0], "", _read_labels(note))
        metadata: dict[str, Any] = {"label": int(note)}
    except ValueError as error:
        return Skipped(key, "bad_row", f"{note_name}: {error}")
    # An npy of another form, such as features, is not metadata of the picture.
    with contextlib.suppress(ValueError):
        numbers = parse_npy(dict(members).get("npy") or b"")
        if numbers.ndim == 1 and numbers.dtype.kind in "biuf":
            metadata["numbers"] = numbers.tolist()
    return Pair(key, images[0], "", metadata)


def _read_labels(note: bytes) -> dict[str, Any]:
    flags = parse_npy(note)
    if flags.ndim != 1 or flags.dtype.kind not in "biuf" or not np.isin(flags, (-1, 0, 1)).all():
        raise ValueError(
            f"expected 0, 1 or -1 for each class, got {flags.dtype} {list(flags.shape)}"
        )
    labels = {"labels": np.flatnonzero(flags == 1).tolist()}
    ignored = np.flatnonzero(flags == -1).tolist()
    return {**labels, "ignored_labels": ignored} if ignored else labels


def _size_limit(name: str) -> int | None:
    """Returns the size limit of a member of this layout, like `tars.size_limit`."""
    key, extension = tars.split_name(name)
    if not key or not extension:
        return None
    if extension in IMAGE_EXTENSIONS:
        return MAX_IMAGE_BYTES
    return _LARGEST_NOTE_BYTES if extension in _NOTE_OF_TYPE.values() else 0
