"""Random choice of a record's caption, of its sentences or words, and of a crop seen by teachers.

Like random crops, all choices are functions of (seed, position). They differ between epochs, and do
not depend on the number of hosts or on restarts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from diht_jax.input.transforms import CROP_RATIO, sample_crop_box
from diht_jax.records.labels.clip_embeddings import ClipEmbeddings, Crops, EmbeddedRecord
from diht_jax.records.samples import (
    add_columns,
    all_captions,
    caption_kinds,
    check_kind,
    parse_columns,
)
from diht_jax.records.schema import Pair, Record
from diht_jax.records.train_data import Points, join_weights, parse_weights

_WEIGHTS = "config.data.caption_weights"
# Fields of a batch, float16 [b, D].
IMAGE_FIELD, TEXT_FIELD = "teacher_image_emb", "teacher_text_emb"

_SIZES = ((640, 480), (333, 500), (224, 224), (1024, 17))  # of images for the hash of the crops


@dataclasses.dataclass(eq=False)
class CaptionChoice:
    """Draws one caption of a record by the weights of the kinds of captions.

    It first draws a kind among those of the record, then uniformly one caption of this kind. The
    fraction of a kind therefore does not depend on its number of captions.
    """

    # Kind -> points of `parse_weights`; None draws uniformly from all captions of a record.
    weights: Mapping[str, Points] | None = None
    columns: Mapping[str, str] | None = None  # metadata column with captions -> their kind
    batch_size: int = dataclasses.field(kw_only=True)  # global, for the step of a position

    def __post_init__(self):
        points_of = self.weights or {}
        # Latest first: the segment of a step is the first one with a start that it has reached.
        self._segments = [
            (step, dict(zip(points_of, map(float, values), strict=True)))
            for step, values in reversed(join_weights(list(points_of.values())))
        ]

    def choose(self, record: Pair, number: float, position: int) -> str:
        """Returns the caption of an example, by a random number from [0, 1).

        If the weights of all kinds of the record are 0, this is its first caption.

        Raises:
            ValueError: a kind has no weight, or kinds do not match the record's captions.
        """
        if self.columns:
            record = add_columns(record, self.columns)
        if not self._segments:
            captions = all_captions(record)
            return captions[int(number * len(captions))]
        by_kind: dict[str, list[str]] = {}
        for text, kind in caption_kinds(record).items():
            by_kind.setdefault(kind, []).append(text)
        weights = self._weights(record, by_kind, position // self.batch_size)
        rest = number * sum(weights)
        for weight, texts in zip(weights, by_kind.values(), strict=True):
            if rest < weight:
                return texts[min(int(rest / weight * len(texts)), len(texts) - 1)]
            rest -= weight
        return record.caption

    def _weights(self, record: Pair, kinds: Collection[str], step: int) -> list[float]:
        found = next(weights for first, weights in self._segments if first <= step)
        for kind in kinds:
            if kind not in found:
                raise ValueError(
                    f"record '{record.key}': {_WEIGHTS} has no weight for its captions of kind "
                    f"'{kind}', only for {', '.join(found)}; add {kind}=0 to leave them out"
                )
        return [found[kind] for kind in kinds]


def open_caption_choice(data: ml_collections.ConfigDict) -> CaptionChoice:
    """Returns the choice of captions for `config.data.captions="sample"`.

    Raises:
        ValueError: `caption_weights` or `caption_columns` are wrong; names the key.
    """
    weights = _parse_kinds(data.caption_weights)
    columns = parse_columns(data.caption_columns, "config.data.caption_columns")
    for kind in columns.values():
        if weights and kind not in weights:
            raise ValueError(
                f"config.data.caption_columns: {_WEIGHTS} has no weight for kind '{kind}', only "
                f"for {', '.join(weights)}"
            )
    return CaptionChoice(weights or None, columns, batch_size=data.batch_size)


def draw_part(caption: str, parts: Sequence[str], count: int, number: float) -> str:
    """Returns `count` consecutive sentences or words of a caption, joined by spaces.

    `number`, drawn from [0, 1), selects the first. With at most `count` parts, returns `caption`.
    """
    starts = len(parts) - count + 1
    if starts <= 1:
        return caption
    first = int(number * starts)
    return " ".join(parts[first : first + count])


def _parse_kinds(given: str | Mapping[str, Any] | None) -> dict[str, Points]:
    """Parses caption weights (text or config section) to kind -> points; empty if not given."""
    if isinstance(given, str):
        section: dict[str, Any] = {}
        for part in filter(None, given.split(",")):
            kind, _, weight = (piece.strip() for piece in part.partition("="))
            try:
                number = float(weight)
            except ValueError:
                number = None
            if number is None or kind in section:
                raise ValueError(
                    f"{_WEIGHTS}='{given}': expected each kind once with its weight, such as "
                    "alt=1,synthetic=3; a schedule is a section of the recipe, "
                    "dict(alt=((0, 1.0), (10000, 0.5)), synthetic=1.0)"
                )
            section[kind] = number
        given = section
    weights = {}
    for kind, weight in (given or {}).items():
        check_kind(kind, _WEIGHTS)
        weights[kind] = parse_weights(f"{_WEIGHTS}.{kind}", weight)
    for step, values in join_weights(list(weights.values())):
        if not any(values):
            raise ValueError(f"{_WEIGHTS}: all weights are 0 from step {step} on")
    return weights


def crop_box(
    crops: Crops, key: str, number: int, width: int, height: int
) -> tuple[int, int, int, int]:
    """Returns a fixed crop of a record's image by its number: left, top, right, bottom in pixels.

    Width and height are those of the upright image.
    """
    return sample_crop_box(width, height, crops.generator(key, number), crops.scale, CROP_RATIO)


def with_boxes(crops: Crops) -> Crops:
    """Returns the crops with a hash of some crop boxes that this machine draws."""
    if not crops.count:
        return dataclasses.replace(crops, boxes="")
    boxes = [crop_box(crops, f"key {i}", i, *size) for i, size in enumerate(_SIZES)]
    digest = hashlib.sha256(json.dumps(boxes).encode()).hexdigest()[:16]
    return dataclasses.replace(crops, boxes=digest)


def check_crops(clips: ClipEmbeddings | None, where: str) -> None:
    """Raises ValueError if this machine would draw other crops than those seen by the teachers.

    `where` names key and folder for the message. None for `clips` passes.
    """
    if clips is not None and with_boxes(clips.clip_facts.crops) != clips.clip_facts.crops:
        raise ValueError(
            f"{where}: numpy {np.__version__} draws other crops than the one that the teachers' "
            "embeddings were made with; take that version, or run data_prep.label again"
        )


def take_view(
    record: Record, width: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.random.Generator]:
    """Chooses one view of a record that the teachers have seen.

    `rng`, the generator of the position in the run, chooses the view.

    Returns:
        `teacher_image_emb` and `teacher_text_emb`, float16 [width], which are zeros if there are
        none, and the generator that draws the crop of the view.
    """
    if not isinstance(record, EmbeddedRecord) or not record.clip_views or not record.crops:
        nothing = np.zeros(width, np.float16)
        return {IMAGE_FIELD: nothing, TEXT_FIELD: nothing}, rng
    views, number = record.clip_views, 0
    if record.crops.count:
        number = int(rng.integers(record.crops.count))
        rng = record.crops.generator(record.key, number)
    return {
        IMAGE_FIELD: views.image_emb[number].astype(np.float16),
        TEXT_FIELD: views.text_emb.astype(np.float16),
    }, rng
