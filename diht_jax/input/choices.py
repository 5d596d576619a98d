"""Choices among what a record offers to an example: captions, sentences, crops that teachers saw.

All are functions of (seed, position), as a random crop is: another choice each time that the
record comes, the same one on any hosts and after any restart.
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
# In a batch, float16 [b, D].
IMAGE_FIELD, TEXT_FIELD = "teacher_image_emb", "teacher_text_emb"

_SIZES = ((640, 480), (333, 500), (224, 224), (1024, 17))  # of pictures, to try the crops on


class CaptionChoice:
    """Draws one caption of a record by the weights of their kinds.

    A kind is drawn first, among those that the record has, then one of its captions, all of them
    alike: so the share of a kind does not depend on how many captions of it there are.
    """

    def __init__(
        self,
        weights: Mapping[str, Points] | None = None,
        columns: Mapping[str, str] | None = None,
        *,
        batch_size: int,
    ):
        """Makes the tables.

        Args:
            weights: kind -> points of `parse_weights`; None: each caption of a record is as likely
                as the others, of any kind.
            columns: column of the metadata that holds captions -> their kind.
            batch_size: global: the positions of the run that make a step.
        """
        self._columns = dict(columns or {})
        self._batch_size = batch_size
        points_of = weights or {}
        # From the last step on, for the first that a step has reached is the one that holds.
        self._segments = [
            (step, dict(zip(points_of, map(float, values), strict=True)))
            for step, values in reversed(join_weights(list(points_of.values())))
        ]

    def choose(self, record: Pair, number: float, position: int) -> str:
        """The caption of an example, by a number that is drawn from [0, 1).

        The record's first one where the weights of all its kinds are 0.

        Raises:
            ValueError: a kind without weight, or kinds that do not fit the record's captions.
        """
        if self._columns:
            record = add_columns(record, self._columns)
        if not self._segments:
            captions = all_captions(record)
            return captions[int(number * len(captions))]
        by_kind: dict[str, list[str]] = {}
        for text, kind in caption_kinds(record).items():
            by_kind.setdefault(kind, []).append(text)
        weights = self._weights(record, by_kind, position // self._batch_size)
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
    """The choice that `config.data` asks for by captions="sample".

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
    """Some of the sentences or words of a caption, in a row from any place alike, with spaces.

    The caption where it has no more than `count`. The place is by a number drawn from [0, 1).
    """
    starts = len(parts) - count + 1
    if starts <= 1:
        return caption
    first = int(number * starts)
    return " ".join(parts[first : first + count])


def _parse_kinds(given: str | Mapping[str, Any] | None) -> dict[str, Points]:
    """Kind -> points, of a text or a section; empty where none is given."""
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
    """A fixed crop, by its number, of a record's picture: left, top, right, bottom in pixels.

    Width and height are those of the upright picture.
    """
    return sample_crop_box(width, height, crops.generator(key, number), crops.scale, CROP_RATIO)


def with_boxes(crops: Crops) -> Crops:
    """The crops with the hash of some of them, as this machine draws them."""
    if not crops.count:
        return dataclasses.replace(crops, boxes="")
    boxes = [crop_box(crops, f"key {i}", i, *size) for i, size in enumerate(_SIZES)]
    digest = hashlib.sha256(json.dumps(boxes).encode()).hexdigest()[:16]
    return dataclasses.replace(crops, boxes=digest)


def check_crops(clips: ClipEmbeddings | None, where: str) -> None:
    """Raises ValueError where this machine would draw other crops than the teachers have seen.

    `where` names key and folder; None passes.
    """
    if clips is not None and with_boxes(clips.clip_facts.crops) != clips.clip_facts.crops:
        raise ValueError(
            f"{where}: numpy {np.__version__} draws other crops than the one that the teachers' "
            "embeddings were made with; take that version, or run data_prep.label again"
        )


def take_view(
    record: Record, width: int, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.random.Generator]:
    """The teachers' embeddings of one view of a record, and what draws that view.

    `rng`, of the position in the run, chooses the view.

    Returns:
        `teacher_image_emb` and `teacher_text_emb`, float16 [width], zeros where there are none; and
        the generator of the view's crop.
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
