"""The student's view of a record that CLIP teachers have embedded: a crop that they have seen."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np

from diht_jax.input.transforms import sample_crop_box
from diht_jax.records.labels.clip_embeddings import ClipRows, Crops, Manifest
from diht_jax.records.schema import Record

CROP_RATIO = (3 / 4, 4 / 3)  # of width and height, as everywhere in training
# In a batch, float16 [b, D].
IMAGE_FIELD, TEXT_FIELD = "teacher_image_emb", "teacher_text_emb"

_SIZES = ((640, 480), (333, 500), (224, 224), (1024, 17))  # of pictures, to try the crops on


def crop_box(
    crops: Crops, key: str, number: int, width: int, height: int
) -> tuple[int, int, int, int]:
    """A fixed crop of a record's picture: left, top, right, bottom in pixels.

    Args:
        crops: with a count of at least 1.
        key: of the record.
        number: of the crop.
        width: of the upright picture.
        height: likewise.
    """
    return sample_crop_box(width, height, crops.generator(key, number), crops.scale, CROP_RATIO)


def with_boxes(crops: Crops) -> Crops:
    """The crops with the hash of some of them, as this machine draws them."""
    if not crops.count:
        return dataclasses.replace(crops, boxes="")
    boxes = [crop_box(crops, f"key {i}", i, *size) for i, size in enumerate(_SIZES)]
    digest = hashlib.sha256(json.dumps(boxes).encode()).hexdigest()[:16]
    return dataclasses.replace(crops, boxes=digest)


def check_crops(rows: ClipRows, where: str) -> None:
    """Raises ValueError where this machine would draw other crops than the teachers have seen.

    Args:
        rows: of a source.
        where: key and folder, for the message.
    """
    crops = rows.manifest.crops
    if with_boxes(crops) != crops:
        raise ValueError(
            f"{where}: numpy {np.__version__} draws other crops than the one that the teachers' "
            "embeddings were made with; take that version, or run data_prep.label again"
        )


def take_view(
    record: Record, manifest: Manifest | None, width: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.random.Generator]:
    """The teachers' embeddings of one view of a record, and what draws that view.

    Args:
        record: an `EmbeddedRecord` where its source has embeddings.
        manifest: of these; None where the source has none.
        width: D.
        rng: of the position in the run; chooses the view.

    Returns:
        `teacher_image_emb` and `teacher_text_emb`, float16 [D], zeros where there are none; and the
        generator of the view's crop.
    """
    row = getattr(record, "clip_row", None)
    if row is None or not row["embedded"]:
        nothing = np.zeros(width, np.float16)
        return {IMAGE_FIELD: nothing, TEXT_FIELD: nothing}, rng
    number, crops = 0, manifest.crops
    if crops.count:
        number = int(rng.integers(crops.count))
        rng = crops.generator(record.key, number)
    image_emb, text_emb = row["image_emb"][number], row["text_emb"]
    return {
        IMAGE_FIELD: image_emb.astype(np.float16),
        TEXT_FIELD: text_emb.astype(np.float16),
    }, rng
