"""Frozen CLIP models that embed pictures and captions, for the affinity loss in training.

They may be any models that `diht_jax.load_model` can load; several form an ensemble. Their
embeddings teach the student directly instead of through concepts. Therefore they are not in
`registry.py` and have their own section, `config.clip_teachers`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from data_prep.teachers import base
from diht_jax.config.keys import (
    COUNT,
    FLOATS,
    NOT_NEGATIVE,
    SHARE_NOT_0,
    Key,
    OneOf,
    build_config,
    check_ranges,
)
from diht_jax.input import transforms
from diht_jax.input.choices import crop_box, with_boxes
from diht_jax.input.transforms import ImageError, decode_rgb
from diht_jax.records.labels.clip_embeddings import DTYPES, ClipFacts, ClipTeacher, Crops
from diht_jax.records.schema import Record

if TYPE_CHECKING:
    from diht_jax.weights.inference import LoadedModel

# A record prepared for embedding: (side in px, preprocessing) -> uint8 [views, side, side, 3], one
# entry for each kind of input that the models take.
Views = dict[tuple[int, transforms.Preprocessing], np.ndarray]


KEYS: dict[str, Any] = {
    # Comma-separated models for `diht_jax.load_model`: released models, work directories or
    # weight files. None: no CLIP embeddings are stored.
    "models": str,
    "crops": Key(0, NOT_NEGATIVE),  # fixed crops of each picture to embed; 0: the central square
    # Range of a crop's share of the picture's area, as config.data.crop_scale in training.
    "crop_scale": Key((0.9, 1.0), SHARE_NOT_0),
    "seed": 0,  # seed of the crops
    "embedding_dtype": Key("int8", OneOf(DTYPES)),  # dtype of stored embeddings; or "float16"
    "dtype": Key(str, FLOATS),  # dtype of the computation; None: that of `load_model`
    "batch_size": Key(64, COUNT),  # pairs per batch, over all devices
}


def default_config() -> ml_collections.ConfigDict:
    """Returns the default config section `clip_teachers`."""
    return build_config(KEYS)


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError for a value that is out of range in the section."""
    check_ranges(config, KEYS, "config.clip_teachers.")


class ClipTeachers(base.Teacher):
    """CLIP models that embed the same views of each picture, and its caption.

    Results are [views + 1, D], the caption last. D joins the models' L2-normalised embeddings.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        """Loads the models of the section `clip_teachers`.

        Raises:
            ValueError: a model, named in the message, cannot be loaded.
        """
        from diht_jax.loading import load_model

        models = {}
        for name in map(str.strip, config.models.split(",")):
            try:
                models[name] = load_model(name, dtype=config.dtype)
            except ValueError as error:
                raise ValueError(f"config.clip_teachers.models='{name}': {error}") from error
        self._models = tuple(models.values())
        teachers = tuple(
            ClipTeacher(name, m.fingerprint(), m.embed_dim, m.image_size, m.logit_scale)
            for name, m in models.items()
        )
        crops = Crops(config.crops, tuple(config.crop_scale), config.seed)
        self.facts = ClipFacts(teachers, with_boxes(crops), config.embedding_dtype)
        self.info = base.TeacherInfo(
            self.facts.meaning, in_this_process=True, name=", ".join(models)
        )
        self._batch_size = config.batch_size

    def embed(self, records: Iterable[Record]) -> Iterator[list[base.Embedded]]:
        """See `Teacher.embed`. Decodes the pictures of the next batch meanwhile."""
        for chunk, results in base.prepare_ahead(
            records, self._batch_size, base.MAX_DECODING_THREADS, self._prepare
        ):
            self._embed_chunk(chunk, results)
            yield results

    def _prepare(self, record: Record) -> Views | str:
        """Returns the views of a picture in each model's input size, or why there are none."""
        try:
            image = decode_rgb(record.image)
        except ImageError as error:
            return f"image_{error.reason}"
        crops, forms = self.facts.crops, set(map(_pictures_of, self._models))
        if not crops.count:
            return {form: transforms.eval_transform(image, *form)[None] for form in forms}
        boxes = [crop_box(crops, record.key, i, *image.size) for i in range(crops.count)]
        return {
            (size, pictures): np.stack(
                [
                    transforms.crop_to_square(image, box, size, pictures.interpolation)
                    for box in boxes
                ]
            )
            for size, pictures in forms
        }

    def _embed_chunk(self, records: Sequence[Record], results: list[Any]) -> None:
        """Replaces the prepared views of each record by its embeddings."""
        good = [i for i, result in enumerate(results) if not isinstance(result, str)]
        if not good:
            return
        parts = []
        for model in self._models:
            views = np.concatenate([results[i][_pictures_of(model)] for i in good])
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


def _pictures_of(model: LoadedModel) -> tuple[int, transforms.Preprocessing]:
    return model.image_size, model.preprocessing


def load_clip_teachers(config: ml_collections.ConfigDict) -> ClipTeachers:
    """Returns the teachers of the section `clip_teachers`, loaded once per process.

    Raises:
        ValueError: a model, named in the message, cannot be loaded.
    """
    return _load(ml_collections.FrozenConfigDict(config))


_load = functools.lru_cache(maxsize=1)(ClipTeachers)


def open_clip_teachers(config: ml_collections.ConfigDict) -> base.Teacher:
    """Returns the teachers for a task. Errors of shared ones are raised at the first batch."""
    return base.open_shared(functools.partial(load_clip_teachers, config), config.batch_size)
