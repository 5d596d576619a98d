"""Frozen CLIPs that embed pictures and captions, for the affinity loss of training.

Any model that `diht_jax.load_model` reads; several are an ensemble. Their embeddings teach the
student directly and not by concepts, so that they are not among the teachers of `registry.py` and
have a section of their own, `config.clip_teachers`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from data_prep.jobs.models import is_shared
from data_prep.teachers.base import (
    MAX_DECODING_THREADS,
    Embedded,
    Teacher,
    TeacherInfo,
    prepare_ahead,
)
from data_prep.teachers.registry import SharedTeacher
from diht_jax.input import transforms
from diht_jax.input.choices import crop_box, with_boxes
from diht_jax.input.decode import ImageError, decode_rgb
from diht_jax.records.labels.clip_embeddings import DTYPES, ClipFacts, ClipTeacher, Crops
from diht_jax.records.schema import Record

# What a record that could be embedded is prepared as: side in px -> uint8 [views, side, side, 3].
Views = dict[int, np.ndarray]


def default_config() -> ml_collections.ConfigDict:
    """The config section `clip_teachers`."""
    c = ml_collections.ConfigDict()
    # What `diht_jax.load_model` reads, with commas between: released models, work directories,
    # files of weights. None: no embeddings of CLIPs are kept.
    c.models = placeholder(str)
    c.crops = 0  # fixed crops of each picture that are embedded; 0: the centre alone
    c.crop_scale = (0.9, 1.0)  # their area, as config.data.crop_scale of the training
    c.seed = 0  # of the crops
    c.embedding_dtype = "int8"  # of the kept embeddings; or "float16"
    c.dtype = placeholder(str)  # of the computation; None: that of `load_model`
    c.batch_size = 64  # pairs at once, over all devices
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a value out of its range in the section."""
    scale = tuple(config.crop_scale)
    if config.crops < 0:
        raise ValueError(f"config.clip_teachers.crops={config.crops}; expected at least 0")
    if config.batch_size < 1:
        raise ValueError(
            f"config.clip_teachers.batch_size={config.batch_size}; expected at least 1"
        )
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"config.clip_teachers.crop_scale={scale}; expected two shares of the area, the lower "
            "first, such as (0.9, 1.0)"
        )
    if config.embedding_dtype not in DTYPES:
        raise ValueError(
            f"config.clip_teachers.embedding_dtype='{config.embedding_dtype}'; expected "
            f"{' or '.join(DTYPES)}"
        )


class ClipTeachers(Teacher):
    """CLIPs that see the same views of a picture; each vector is [views + 1, D], the text last.

    D has the embeddings of all of them, one behind the other, each L2-normalised.
    """

    def __init__(self, models: dict[str, Any], crops: Crops, dtype: str, batch_size: int):
        """Wraps models that are ready.

        Args:
            models: a `LoadedModel` by the name that it was loaded by.
            crops: that they see.
            dtype: of the kept embeddings.
            batch_size: pairs at once.
        """
        self._models = tuple(models.values())
        teachers = tuple(
            ClipTeacher(name, m.fingerprint(), m.embed_dim, m.image_size, m.logit_scale)
            for name, m in models.items()
        )
        self.facts = ClipFacts(teachers, with_boxes(crops), dtype)
        self.info = TeacherInfo(self.facts.meaning, in_this_process=True, name=", ".join(models))
        self._batch_size = batch_size

    @classmethod
    def load(cls, config: ml_collections.ConfigDict) -> ClipTeachers:
        """The models of a section `clip_teachers`.

        Raises:
            ValueError: a model that `load_model` does not read; names it.
        """
        from diht_jax.loading import load_model

        models = {}
        for name in map(str.strip, config.models.split(",")):
            try:
                models[name] = load_model(name, dtype=config.dtype)
            except ValueError as error:
                raise ValueError(f"config.clip_teachers.models='{name}': {error}") from error
        crops = Crops(config.crops, tuple(config.crop_scale), config.seed)
        return cls(models, crops, config.embedding_dtype, config.batch_size)

    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """See `Teacher.embed`; the pictures of the next batch are decoded meanwhile."""
        for chunk, results in prepare_ahead(
            records, self._batch_size, MAX_DECODING_THREADS, self._prepare
        ):
            self._embed_chunk(chunk, results)
            yield results

    def _prepare(self, record: Record) -> Views | str:
        """The views of a picture in the sizes of all teachers, or why there are none."""
        try:
            image = decode_rgb(record.image)
        except ImageError as error:
            return f"image_{error.reason}"
        crops, sizes = self.facts.crops, {teacher.image_size for teacher in self._models}
        if not crops.count:
            return {size: transforms.eval_transform(image, size)[None] for size in sizes}
        boxes = [crop_box(crops, record.key, i, *image.size) for i in range(crops.count)]
        return {
            size: np.stack([transforms.crop_to_square(image, box, size) for box in boxes])
            for size in sizes
        }

    def _embed_chunk(self, records: Sequence[Record], results: list[Any]) -> None:
        """Replaces the views of each record that could be prepared by its embeddings."""
        good = [i for i, result in enumerate(results) if not isinstance(result, str)]
        if not good:
            return
        parts = []
        for model in self._models:
            views = np.concatenate([results[i][model.image_size] for i in good])
            image_emb = model.encode_image(views).reshape(len(good), -1, model.embed_dim)
            text_emb = model.encode_text([records[i].caption for i in good])
            parts.append(np.concatenate([image_emb, text_emb[:, None]], axis=1))
        vectors = np.concatenate(parts, axis=2)
        if not np.isfinite(vectors).all():
            raise ValueError(
                f"config.clip_teachers.models='{self.info.name}': values that are not finite; the "
                "weights or config.clip_teachers.dtype are wrong"
            )
        for vector, i in zip(vectors, good, strict=True):
            results[i] = vector


def load_clip_teachers(config: ml_collections.ConfigDict) -> ClipTeachers:
    """The teachers of a section `clip_teachers`; loaded once per process.

    Raises:
        ValueError: a model that cannot be read; names it.
    """
    return _load(json.dumps(config.to_dict(), sort_keys=True))


def open_clip_teachers(config: ml_collections.ConfigDict) -> Teacher:
    """The teachers that a task should embed with: of this process, or those that workers share."""
    if is_shared():
        return SharedTeacher(functools.partial(load_clip_teachers, config), config.batch_size)
    return load_clip_teachers(config)


@functools.lru_cache(maxsize=1)
def _load(settings: str) -> ClipTeachers:
    return ClipTeachers.load(ml_collections.ConfigDict(json.loads(settings)))
