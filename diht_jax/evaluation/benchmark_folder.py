"""Data sets in the layout of CLIP_benchmark: tars with labels, class names and templates.

Called by `sources` and `task_specs`. The layout is that of CLIP_benchmark 1.6,
`clip_benchmark/datasets/builder.py`:

    DIR/SPLIT/0.tar, 1.tar, ...      KEY.jpg (png, webp) with KEY.cls (a number), KEY.npy (0 and 1
    DIR/SPLIT/nshards.txt            for each class) or KEY.txt (captions, one a line)
    DIR/classnames.txt               one a line, in label order
    DIR/zeroshot_classification_templates.txt   one a line, with "{c}" for the class name
    DIR/dataset_type.txt             "retrieval", "multilabel"; without it "classification"
"""

from __future__ import annotations

import dataclasses
import io
import pathlib
import tarfile
from collections.abc import Iterator

import numpy as np

from diht_jax.data.schema import Pair
from diht_jax.data.source import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Skipped,
    merge_captions,
    pick_captions,
)
from diht_jax.evaluation.prompts import CLASS_SLOT, check_templates, read_class_names, read_lines

CLASSIFICATION, MULTILABEL, RETRIEVAL = "classification", "multilabel", "retrieval"
DEFAULT_SPLIT = "test"

_NOTE_OF_TYPE = {CLASSIFICATION: "cls", MULTILABEL: "npy", RETRIEVAL: "txt"}
_LARGEST_NOTE_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class BenchmarkFolder:
    """One split of a data set.

    Attributes:
        type: "classification", "multilabel" or "retrieval".
        paths: of the tars, in order.
        class_names: None where the folder has none.
        templates: with "{}" for the class name; None where the folder has none.
    """

    type: str
    paths: tuple[str, ...]
    class_names: tuple[str, ...] | None
    templates: tuple[str, ...] | None


def open_benchmark_folder(folder: str, split: str = DEFAULT_SPLIT) -> BenchmarkFolder:
    """Looks at a data set; reads no image.

    Raises:
        ValueError: not such a folder, or shards are missing.
    """
    root = pathlib.Path(folder)
    count_file = root / split / "nshards.txt"
    if not count_file.is_file():
        raise ValueError(
            f"{folder}: expected CLIP_benchmark's layout, but there is no {split}/nshards.txt"
        )
    count = count_file.read_text().strip()
    if not count.isdecimal() or count == "0":
        raise ValueError(f"{count_file}: expected the number of shards, got '{count}'")
    paths = [root / split / f"{number}.tar" for number in range(int(count))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(
            f"{root / split}: {len(missing)} of {len(paths)} shards are missing: "
            f"{', '.join(missing[:5])}"
        )
    type_file = root / "dataset_type.txt"
    kind = type_file.read_text().strip().lower() if type_file.is_file() else CLASSIFICATION
    if kind not in _NOTE_OF_TYPE:
        raise ValueError(f"{type_file}: expected one of {', '.join(_NOTE_OF_TYPE)}, got '{kind}'")
    names, templates = root / "classnames.txt", root / "zeroshot_classification_templates.txt"
    return BenchmarkFolder(
        type=kind,
        paths=tuple(map(str, paths)),
        class_names=read_class_names(names) if names.is_file() else None,
        templates=_read_templates(templates) if templates.is_file() else None,
    )


def read_benchmark_folder(folder: BenchmarkFolder) -> Iterator[Pair | Skipped]:
    """Yields the pairs of all shards.

    `metadata["label"]` is an int for a classification; for a multi-label set
    `metadata["labels"]` lists the numbers of its classes. Those pairs have no caption.

    Raises:
        ValueError: a damaged archive.
    """
    for path in folder.paths:
        for key, members in _read_groups(path):
            yield _make_pair(key, members, folder.type)


def _read_templates(path: pathlib.Path) -> tuple[str, ...]:
    lines = [line.replace("{c}", CLASS_SLOT) for line in read_lines(path) if line]
    try:
        return check_templates(lines)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _make_pair(key: str, members: dict[str, bytes | None], kind: str) -> Pair | Skipped:
    images = [data for extension, data in members.items() if extension in IMAGE_EXTENSIONS]
    if len(images) != 1:
        reason = "duplicate" if images else "no_image"
        return Skipped(key, reason, f"found {', '.join(members)}")
    if images[0] is None:
        return Skipped(key, "too_large", f"an image file of over {MAX_IMAGE_BYTES} bytes")
    note = members.get(_NOTE_OF_TYPE[kind])
    if note is None:
        reason = "no_caption" if kind == RETRIEVAL else "bad_row"
        return Skipped(key, reason, f"no {_NOTE_OF_TYPE[kind]} among {', '.join(members)}")
    if kind == RETRIEVAL:
        captions = pick_captions(note.decode("utf-8-sig", "replace").splitlines())
        if not captions:
            return Skipped(key, "no_caption", "the txt is blank")
        return Pair(key, images[0], captions[0], merge_captions({}, captions))
    try:
        if kind == CLASSIFICATION:
            return Pair(key, images[0], "", {"label": int(note)})
        labels = np.load(io.BytesIO(note), allow_pickle=False)
        return Pair(key, images[0], "", {"labels": np.flatnonzero(labels).tolist()})
    except ValueError as error:
        return Skipped(key, "bad_row", f"{_NOTE_OF_TYPE[kind]}: {error}")


def _read_groups(path: str) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """Yields the key and the members by extension of every entry; too large ones are None."""
    key, members = None, {}
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                name, _, extension = member.name.rpartition("/")[2].partition(".")
                name = member.name.removesuffix(f".{extension}") if extension else ""
                if not member.isreg() or not name:
                    continue
                if name != key:
                    if members:
                        yield key, members
                    key, members = name, {}
                extension = extension.lower()
                is_image = extension in IMAGE_EXTENSIONS
                small = member.size <= (MAX_IMAGE_BYTES if is_image else _LARGEST_NOTE_BYTES)
                members[extension] = tar.extractfile(member).read() if small else None
            if members:
                yield key, members
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{path}: the tar archive cannot be read to its end ({type(error).__name__}: {error})"
        ) from error
