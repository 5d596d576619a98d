"""Decodes one record into one training example: a random crop and token ids."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from diht_jax.data import tokenizer
from diht_jax.data.file_tokenizer import FileTokenizer
from diht_jax.input import decode as images
from diht_jax.input import fast_crops, transforms
from diht_jax.input.choices import CaptionChoice, draw_sentences, take_view
from diht_jax.records import schema

# Replaced by the caption in a text template.
_CAPTION = "{caption}"

_WORD = re.compile(r"[^\W_]+")
_ARTICLES = frozenset(("a", "an", "the"))


@dataclasses.dataclass(eq=False)
class DecodeExample(grain.transforms.RandomMap):
    """One serialised record -> one training example: random crop and token ids."""

    image_size: int  # pixels, of both sides
    context_length: int  # t, token ids per text
    crop_scale: tuple[float, float]  # range of the crop's share of the picture's area
    text_template: str  # with `{caption}` in it
    fast_decode: bool = True  # as `fast_crops` does it; otherwise as exactly as evaluation does
    num_concepts: int = 0  # k, the teacher's labels to take of each kind; 0 for none
    # How many concepts of each of `vocabulary.KINDS` there are; a record with an id beyond them is
    # bad. None where that is not known.
    vocabulary_sizes: Sequence[int] | None = None
    teacher_width: int = 0  # D, of the CLIP teachers' embeddings to take; 0 for none
    # Draws one of a record's captions; None takes the first.
    caption_choice: CaptionChoice | None = None
    caption_sentences: int = 0  # of the caption, to draw; 0 takes all
    pair_ids: bool = False  # examples have ids that are equal for equal texts
    # Of the metadata; records with this key have the id of its value instead.
    class_key: str | None = None
    vocab_size: int = tokenizer.VOCAB_SIZE  # entries of the text tower's vocabulary
    own_tokenizer: FileTokenizer | None = None  # of the model; None is CLIP's
    interpolation: str = "bicubic"  # of the pictures, as in `transforms.Preprocessing`

    def __post_init__(self):
        if _CAPTION not in self.text_template:
            raise ValueError(f"config.data.text_template='{self.text_template}': lacks {_CAPTION}")
        try:
            if self.own_tokenizer is None:
                tokenizer.check_vocab_size(self.vocab_size)
        except ValueError as error:
            raise ValueError(f"config.model.overrides.{error}") from error

    @property
    def example_bytes(self) -> int:
        """Size of one example."""
        num_bytes = 3 * self.image_size**2 + 4 * self.context_length
        num_bytes += 4 * self.teacher_width + 8 * self.pair_ids
        return num_bytes + 8 * self.num_concepts * len(schema.CONCEPT_FIELDS)

    def random_map(self, element: bytes, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Decodes one serialised `tf.train.Example`.

        Args:
            rng: decides the crop.

        Returns:
            `images` uint8 [size, size, 3] and `tokens` int32 [t]; with concepts also
            `object_ids` int32 [k], `object_probs` float32 [k], `attribute_ids` and
            `attribute_probs`. Probabilities are 0 behind the last label of a record, and all 0
            where it has none. With a width of teachers also what `choices.take_view` gives;
            with ids also `pair_ids` uint32 [2].

        Raises:
            ValueError: the image cannot be decoded, or a label is beyond its vocabulary; names the
                record's key.
        """
        return self.plan(schema.decode_record(element), rng)()

    def plan(
        self, record: schema.Record, rng: np.random.Generator, position: int = 0
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Everything of `random_map` but the pixels; what is returned decodes them.

        Either call may raise the errors of `random_map`.

        Args:
            rng: decides the crop, then the caption, then its sentences, so that what comes before
                is the same either way.
            position: of the example in the run, for a choice of captions that changes with it.
        """
        labels = self._take_labels(record) if self.num_concepts else {}
        view, crop_rng = {}, rng
        if self.teacher_width:
            view, crop_rng = take_view(record, self.teacher_width, rng)
        try:
            crop = self._plan_crop(record.image, crop_rng)
        except images.ImageError as error:
            raise _bad_picture(record.key, error) from error
        caption = record.caption
        if self.caption_choice is not None:
            caption = self.caption_choice.choose(record, rng.random(), position)
        if self.caption_sentences:
            caption = draw_sentences(caption, self.caption_sentences, rng.random())
        text = self.text_template.replace(_CAPTION, caption)
        example = {"tokens": self._tokenize(text, record.key), **view}
        if self.pair_ids:
            found = None if self.class_key is None else record.metadata.get(self.class_key)
            example["pair_ids"] = pair_id(example["tokens"], found)
        return functools.partial(_decode_pixels, record.key, crop, example | labels)

    def _tokenize(self, text: str, key: str) -> np.ndarray:
        if self.own_tokenizer is None:
            return tokenizer.tokenize(text, self.context_length, self.vocab_size)[0]
        (ids,) = self.own_tokenizer.tokenize(text, self.context_length)
        if ids.max() >= self.vocab_size:
            raise ValueError(
                f"record '{key}': its caption has the token id {ids.max()} of "
                f"config.model.tokenizer, and config.model.overrides.vocab_size={self.vocab_size}; "
                "expected the tokenizer of the model"
            )
        return ids

    def _take_labels(self, record: schema.Record) -> dict[str, np.ndarray]:
        """The first k labels of each kind, their probabilities summing to 1 again.

        Raises:
            ValueError: an id means no concept: its loss would be NaN, or nonsense.
        """
        labels = {}
        sizes = self.vocabulary_sizes or (None,) * len(schema.CONCEPT_FIELDS)
        for (ids_name, probs_name), size in zip(schema.CONCEPT_FIELDS, sizes, strict=True):
            ids = labels[ids_name] = np.zeros(self.num_concepts, np.int32)
            probs = labels[probs_name] = np.zeros(self.num_concepts, np.float32)
            found = getattr(record, ids_name)
            if found is None or not len(found):
                continue
            if size is not None and not 0 <= found.min() <= found.max() < size:
                raise ValueError(
                    f"record '{record.key}': {ids_name} {found.tolist()} are beyond the vocabulary "
                    f"of {size}; label the data again (python -m data_prep.label)"
                )
            count = min(len(found), self.num_concepts)
            ids[:count] = found[:count]
            probs[:count] = getattr(record, probs_name)[:count]
            if probs.any():
                probs /= probs.sum()
        return labels

    def _plan_crop(self, data: bytes, rng: np.random.Generator) -> Callable[[], np.ndarray]:
        options: dict[str, Any] = {"scale": self.crop_scale, "interpolation": self.interpolation}
        if self.fast_decode:
            return fast_crops.plan_random_crop(data, self.image_size, rng, **options)
        image = images.decode_rgb(data)
        crop = transforms.train_transform(image, self.image_size, rng, **options)
        return lambda: crop


def pair_id(tokens: np.ndarray, class_id: Any = None) -> np.ndarray:
    """A hash of 64 bits that equal pairs share, as two words: JAX has no uint64 by default.

    Two of the 2e9 combinations of a batch of 65,536 agree by chance once in 1e10 batches.

    Args:
        tokens: int [t], of the text.
        class_id: what names the class, as JSON has it, in place of the text; None without one.

    Returns:
        uint32 [2].
    """
    data, kind = np.asarray(tokens, "<i4").tobytes(), b"text"
    if class_id is not None:
        data, kind = json.dumps(class_id, sort_keys=True).encode(), b"class"
    digest = hashlib.blake2b(data, digest_size=8, person=kind).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


def _decode_pixels(
    key: str, crop: Callable[[], np.ndarray], example: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    try:
        return {"images": crop(), **example}
    except images.ImageError as error:
        raise _bad_picture(key, error) from error


def _bad_picture(key: str, error: images.ImageError) -> ValueError:
    return ValueError(
        f"record '{key}': {error}; training expects readable images, which "
        "`python -m data_prep.filter` makes sure of"
    )
