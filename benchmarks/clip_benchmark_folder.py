"""Writes the data of a task in CLIP_benchmark's folder layout.

`diht_jax.evaluation.sources.benchmark_folder` describes and reads the layout. Entries that the two
programs would count differently, because of ties or transparency, are left out and counted.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
import tarfile
from collections import Counter

from PIL import Image

from diht_jax.evaluation.embedding.encoding import UnusablePair
from diht_jax.evaluation.protocols.base import CLASS_SLOT, Task, fill_caption_template
from diht_jax.evaluation.protocols.class_names import name_index, raw_label, resolve_label
from diht_jax.evaluation.protocols.retrieval import captions_of
from diht_jax.evaluation.sources.benchmark_folder import DEFAULT_SPLIT
from diht_jax.evaluation.suite import CLASSIFICATION, RETRIEVAL
from diht_jax.evaluation.task_parsing import open_source
from diht_jax.input.transforms import ImageError, decode_rgb
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

_EXTENSION_OF = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def write_folder(task: Task, folder: pathlib.Path, *, limit: int | None = None) -> Counter[str]:
    """Writes the data of a task as one shard of the split "test".

    Captions are written with the template of the task, because CLIP_benchmark has no templates for
    retrieval. Of several images with equal pixels or equal captions, only the first is written: the
    others would be ties, which CLIP_benchmark breaks at random.

    Args:
        task: a classification with class names, or a retrieval.
        folder: folder to create; must not exist.
        limit: maximum number of images.

    Returns:
        "images" written, and the number of entries left out by reason.

    Raises:
        ValueError: another kind of task, no class names, no usable image, or the folder exists.
    """
    if task.kind not in (CLASSIFICATION, RETRIEVAL):
        raise ValueError(
            f"task '{task.name}': a '{task.kind}' task has no such folder; expected "
            f"'{CLASSIFICATION}' or '{RETRIEVAL}'"
        )
    if task.kind == CLASSIFICATION and not task.class_names:
        raise ValueError(
            f"task '{task.name}': expected class names; add '?class_names=FILE' to the task"
        )
    if folder.exists():
        raise ValueError(f"{folder} is there already; remove it, or name another")
    (folder / DEFAULT_SPLIT).mkdir(parents=True)
    counts: Counter[str] = Counter(images=0)
    notes = _Notes(task)
    with tarfile.open(folder / DEFAULT_SPLIT / "0.tar", "w") as tar:
        for entry in open_source(task).entries():
            if counts["images"] == limit:
                break
            try:
                members = _members(entry, notes)
            except UnusablePair as unusable:
                counts[unusable.reason] += 1
                continue
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{counts['images']:06d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
            counts["images"] += 1
    if not counts["images"]:
        raise ValueError(f"task '{task.name}' ({task.source}): no usable picture ({dict(counts)})")
    texts = {f"{DEFAULT_SPLIT}/nshards.txt": "1", "dataset_type.txt": task.kind}
    if task.kind == CLASSIFICATION:
        texts["classnames.txt"] = "\n".join(task.class_names)
        texts["zeroshot_classification_templates.txt"] = "\n".join(
            template.replace(CLASS_SLOT, "{c}") for template in task.templates
        )
    for name, text in texts.items():
        (folder / name).write_text(f"{text}\n", encoding="utf-8")
    return counts


class _Notes:
    """Label and text of an image, and the images and texts seen before."""

    def __init__(self, task: Task):
        self._task = task
        self._index = name_index(task.class_names or ())
        self._seen: set[str] = set()

    def note_of(self, pair: Pair) -> tuple[str, str]:
        """Returns the extension and the text."""
        if self._task.kind == CLASSIFICATION:
            raw = raw_label(pair, self._task.label)
            return "cls", str(resolve_label(raw, self._task.class_names, self._index))
        captions = [
            " ".join(fill_caption_template(self._task.caption_template, caption).split())
            for caption in captions_of(pair)
        ]
        # CLIP's tokenizer ignores case.
        self._refuse_repeated([caption.casefold() for caption in captions], "caption_seen_before")
        return "txt", "\n".join(captions)

    def check_pixels(self, image: Image.Image) -> None:
        """Raises `UnusablePair` for repeated pixels, if they would be a tie."""
        if self._task.kind == RETRIEVAL:
            digest = hashlib.sha256(image.tobytes()).hexdigest()
            self._refuse_repeated([f"{image.size} {digest}"], "picture_seen_before")

    def _refuse_repeated(self, things: list[str], reason: str) -> None:
        if not self._seen.isdisjoint(things):
            raise UnusablePair(reason)
        self._seen.update(things)


def _members(entry: Pair | Skipped, notes: _Notes) -> dict[str, bytes]:
    """Returns the files of one image: extension -> content."""
    if isinstance(entry, Skipped):
        raise UnusablePair(entry.reason)
    try:
        image = decode_rgb(entry.image)
    except ImageError as error:
        raise UnusablePair(f"image_{error.reason}") from error
    notes.check_pixels(image)
    extension, note = notes.note_of(entry)
    return {**plain_picture(entry.image, image), extension: note.encode()}


def plain_picture(data: bytes, image: Image.Image) -> dict[str, bytes]:
    """Returns an image file that CLIP_benchmark decodes to equal pixels: extension -> content.

    Args:
        data: the encoded image.
        image: the image decoded by `decode_rgb`.
    """
    with Image.open(io.BytesIO(data)) as stored:
        # CLIP_benchmark would decode other pixels from images with a colour key or rotation.
        is_plain = stored.mode == "RGB" and stored.format in _EXTENSION_OF
        is_plain = is_plain and "transparency" not in stored.info and not stored.getexif()
        if is_plain:
            return {_EXTENSION_OF[stored.format]: data}
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"png": buffer.getvalue()}
