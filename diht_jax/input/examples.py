"""Decoding of a record into a training example: a random crop and token ids.

Fast decoding takes less than half of the time of the exact decoding and scaling of evaluation
(`transforms.decode_rgb` and `transforms.eval_transform`). libjpeg-turbo decodes ordinary JPEG files
(8 bits, colour or grey, upright) directly into an array, at a half, a quarter or an eighth of their
size if the crop has enough pixels. cykooz-resizer scales them with Pillow's filter in vector code.
All other files, and those with a decoder warning, are decoded exactly. Exact decoding also decides
on errors, so both ways reject the same files with the same messages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from diht_jax.data import tokenizer
from diht_jax.data.tokenizer import FileTokenizer
from diht_jax.input import transforms
from diht_jax.input.choices import CaptionChoice, draw_part, take_view
from diht_jax.records import schema
from diht_jax.records.samples import split_sentences

try:
    import cykooz_resizer
except ImportError:  # it has no wheels for Linux on ARM
    cykooz_resizer = None

# Replaced by the caption in a text template.
_CAPTION = "{caption}"


# Least ratio of the side of a reduced crop to that of the result. The filter of a reducing decoder
# differs from Pillow's, but with this ratio the difference is hardly visible.
_MIN_OVERSAMPLING = 1.25
_REDUCTIONS = (8, 4, 2)  # those for which libjpeg-turbo has vector code

_EXIF_OR_XMP = b"\xff\xe1"  # marker of a possible orientation; not in compressed pixels
_PLAIN_COLORSPACES = ("YCbCr", "RGB", "Gray")

# A thread does not keep larger pixel buffers.
_MOST_KEPT_BYTES = 2**24

# Each thread has its own resizer, because a resizer has buffers.
_kept = threading.local()


@dataclasses.dataclass(eq=False)
class DecodeExample:
    """Decodes a record into a training example: random crop and token ids."""

    image_size: int  # side of the square image, in pixels
    context_length: int  # t, token ids per text
    crop_scale: tuple[float, float]  # range of the crop's fraction of the image area
    text_template: str  # contains `{caption}` once
    fast_decode: bool = True  # whether to decode ordinary JPEG files faster than evaluation does
    num_concepts: int = 0  # k, the number of teacher labels of each kind to read; 0 for none
    # Number of concepts of each of `vocabulary.KINDS`, or None if unknown; a record with a larger
    # id is bad.
    vocabulary_sizes: Sequence[int] | None = None
    teacher_width: int = 0  # D, width of the CLIP teachers' embeddings to read; 0 for none
    # Draws one of a record's captions; None uses the first.
    caption_choice: CaptionChoice | None = None
    caption_sentences: int = 0  # number of sentences of the caption to draw; 0 uses all
    caption_words: int = 0  # number of words to draw, after the sentences; 0 uses all
    pair_ids: bool = False  # whether examples have ids that are equal for equal texts
    # Key of the metadata; the id of records with this key depends on its value instead.
    class_key: str | None = None
    vocab_size: int = tokenizer.VOCAB_SIZE  # entries of the text tower's vocabulary
    own_tokenizer: FileTokenizer | None = None  # of the model; None is CLIP's
    interpolation: str = "bicubic"  # see `transforms.Preprocessing`

    def __post_init__(self):
        if self.text_template.count(_CAPTION) != 1:  # like the templates of evaluation
            raise ValueError(
                f"config.data.text_template='{self.text_template}': expected {_CAPTION} once"
            )
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

    def plan(
        self, record: schema.Record, rng: np.random.Generator, position: int = 0
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Prepares an example except for its pixels, and returns a function that decodes these.

        Args:
            rng: draws the crop, then the caption, then its sentences, then its words; enabling a
                later draw does not change earlier ones.
            position: of the example in the run, for scheduled caption weights.

        Returns:
            A function that returns `images` uint8 [size, size, 3] and `tokens` int32 [t]. With
            concepts it also returns `object_ids` int32 [k], `object_probs` float32 [k],
            `attribute_ids` and `attribute_probs`; probabilities after the last label of a record
            are 0. With `teacher_width` it also returns the fields of `choices.take_view`, and with
            `pair_ids` also `pair_ids` uint32 [2].

        Raises:
            ValueError: from either call: the image cannot be decoded, or a label is not in its
                vocabulary; names the record's key.
        """
        labels = self._take_labels(record) if self.num_concepts else {}
        view, crop_rng = {}, rng
        if self.teacher_width:
            view, crop_rng = take_view(record, self.teacher_width, rng)
        key = record.key
        with _naming_record(key):
            crop = plan_random_crop(
                record.image,
                self.image_size,
                crop_rng,
                self.crop_scale,
                interpolation=self.interpolation,
                is_exact=not self.fast_decode,
            )
        caption = record.caption
        if self.caption_choice is not None:
            caption = self.caption_choice.choose(record, rng.random(), position)
        if self.caption_sentences:
            sentences = split_sentences(caption)
            caption = draw_part(caption, sentences, self.caption_sentences, rng.random())
        if self.caption_words:
            caption = draw_part(caption, caption.split(), self.caption_words, rng.random())
        text = self.text_template.replace(_CAPTION, caption)
        example = {"tokens": self._tokenize(text, key), **view, **labels}
        if self.pair_ids:
            found = None if self.class_key is None else record.metadata.get(self.class_key)
            example["pair_ids"] = pair_id(example["tokens"], found)

        def decode() -> dict[str, np.ndarray]:
            with _naming_record(key):
                return {"images": crop(), **example}

        return decode

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
        """Returns the first k labels of each kind, with renormalised probabilities.

        Raises:
            ValueError: an id is not in the vocabulary; its loss would be NaN or meaningless.
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


def pair_id(tokens: np.ndarray, class_id: Any = None) -> np.ndarray:
    """Returns a 64-bit hash of a pair, which is the same for equal pairs.

    It is the hash of `class_id` as JSON if given, else that of the tokens, int [t]. In a batch of
    65,536, with 2e9 combinations, a collision occurs once in 1e10 batches.

    Returns:
        uint32 [2], because JAX has no uint64 by default.
    """
    data, kind = np.asarray(tokens, "<i4").tobytes(), b"text"
    if class_id is not None:
        data, kind = json.dumps(class_id, sort_keys=True).encode(), b"class"
    digest = hashlib.blake2b(data, digest_size=8, person=kind).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


@contextlib.contextmanager
def _naming_record(key: str) -> Generator[None]:
    try:
        yield
    except transforms.ImageError as error:
        raise ValueError(
            f"record '{key}': {error}; training expects readable images, which "
            "`python -m data_prep.filter` makes sure of"
        ) from error


def plan_random_crop(
    data: bytes,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.9, 1.0),
    *,
    interpolation: str = "bicubic",
    is_exact: bool = False,
) -> Callable[[], np.ndarray]:
    """Draws a random crop, and returns a function that decodes it and scales it to a square.

    The crop is that of `transforms.train_transform`. For an image decoded at a reduced size, the
    crop is rounded to reduced pixels; its edges move by less than one pixel of the result.

    Only an ordinary JPEG file is decoded later. Any other image is decoded at once, since it may
    need much more memory than its crop. Either call may raise `ImageError` or, for an invalid
    range, ValueError.

    Args:
        size: side of the result, in pixels.
        scale: range of the crop's fraction of the image area.
        interpolation: see `transforms.Preprocessing`.
        is_exact: whether to decode and scale like evaluation.

    Returns:
        A deterministic function that returns uint8 [size, size, 3], possibly read-only.
    """
    image_size = None if is_exact else _size_of_plain_jpeg(data)
    if image_size is None:
        image = transforms.open_image(data)
        if is_exact or not _is_ordinary_jpeg(image):
            picture = transforms.load_rgb(image)
            crop = transforms.train_transform(
                picture, size, rng, scale, interpolation=interpolation
            )
            return lambda: crop
        image_size = image.size
    box = transforms.sample_crop_box(*image_size, rng, scale, transforms.CROP_RATIO)
    return functools.partial(_decode_crop, data, image_size, box, size, interpolation)


def _decode_crop(
    data: bytes,
    image_size: tuple[int, int],
    box: tuple[int, int, int, int],
    size: int,
    interpolation: str,
) -> np.ndarray:
    """Decodes a crop of an ordinary JPEG file and scales it to a square."""
    reduction = choose_reduction(box, size)
    pixels = _decode_jpeg(data, image_size, reduction)
    if pixels is None:
        return transforms.crop_to_square(transforms.decode_rgb(data), box, size, interpolation)
    left, top, right, bottom = (
        edge // reduction for edge in reduce_box(box, image_size, reduction)
    )
    return scale_to_square(pixels[top:bottom, left:right], size, interpolation)


def choose_reduction(box: tuple[int, int, int, int], size: int) -> int:
    """Returns the largest factor (1, 2, 4 or 8) by which an image can be reduced for a crop."""
    left, top, right, bottom = box
    spare = min(right - left, bottom - top) / (size * _MIN_OVERSAMPLING)
    return next((reduction for reduction in _REDUCTIONS if reduction <= spare), 1)


def reduce_box(
    box: tuple[int, int, int, int], image_size: tuple[int, int], reduction: int
) -> tuple[int, int, int, int]:
    """Returns the crop nearest to `box` with edges that are multiples of the reduction.

    If the reduction does not divide the size of the image, the incomplete reduced pixels at the
    right and bottom are excluded.
    """
    limits = [side // reduction for side in image_size] * 2
    left, top, right, bottom = (
        min(round(edge / reduction), limit) * reduction
        for edge, limit in zip(box, limits, strict=True)
    )
    return left, top, right, bottom


def scale_to_square(pixels: np.ndarray, size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Scales uint8 [h, w, 3] like `transforms.crop_to_square`, up to the rounding of one pass."""
    if cykooz_resizer is None:
        box = (0, 0, pixels.shape[1], pixels.shape[0])
        return transforms.crop_to_square(Image.fromarray(pixels), box, size, interpolation)
    resizer, options = _resizer(interpolation)
    height, width = pixels.shape[:2]
    scaled = cykooz_resizer.ImageData(size, size, cykooz_resizer.PixelType.U8x3)
    whole = cykooz_resizer.ImageData(width, height, cykooz_resizer.PixelType.U8x3, pixels.tobytes())
    resizer.resize(whole, scaled, options)
    return np.frombuffer(scaled.get_buffer(), np.uint8).reshape(size, size, 3)  # a copy


def _resizer(interpolation: str) -> tuple[Any, Any]:
    """Returns this thread's resizer, and the options of an antialiased filter."""
    assert cykooz_resizer is not None
    kept = vars(_kept).setdefault("resizers", {})
    if interpolation not in kept:
        # Pillow's BICUBIC is the cubic filter with a = -0.5, which is Catmull-Rom.
        names = {"bicubic": "catmull_rom", "bilinear": "bilinear"}
        kind = getattr(cykooz_resizer.FilterType, names[interpolation])
        convolution = cykooz_resizer.ResizeAlg.convolution(kind)
        options = cykooz_resizer.ResizeOptions(resize_alg=convolution, use_alpha=False)
        kept[interpolation] = cykooz_resizer.Resizer(), options
    return kept[interpolation]


def _size_of_plain_jpeg(data: bytes) -> tuple[int, int] | None:
    """Returns width and height of a JPEG file without EXIF and XMP; None if Pillow must check."""
    if _EXIF_OR_XMP in data:
        return None
    try:
        *sides, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    height, width = map(int, sides)
    is_plain = colorspace in _PLAIN_COLORSPACES and width * height <= transforms.MAX_PIXELS
    return (width, height) if is_plain else None


def _is_ordinary_jpeg(image: Image.Image) -> bool:
    # MPO is JPEG with further images after the first one.
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return False
    if "exif" not in image.info and "xmp" not in image.info:
        return True
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # Pillow raises nearly any type on broken EXIF.
        return False


def _decode_jpeg(data: bytes, image_size: tuple[int, int], reduction: int) -> np.ndarray | None:
    """Decodes uint8 [ceil(h / reduction), ceil(w / reduction), 3], or returns None on any problem.

    The result is valid until this thread decodes its next image.
    """
    width, height = image_size
    reduced = (math.ceil(height / reduction), math.ceil(width / reduction))
    try:
        pixels = simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            min_height=reduced[0],
            min_width=reduced[1],
            min_factor=reduction,
            buffer=_pixel_buffer(3 * reduced[0] * reduced[1]),
        )
    except ValueError:  # includes a second header that needs more than the buffer
        return None
    return pixels if pixels.shape[:2] == reduced else None


def _pixel_buffer(num_bytes: int) -> bytearray:
    """Returns this thread's buffer for decoded pixels; reusing it keeps it in the CPU's caches."""
    if num_bytes > _MOST_KEPT_BYTES:
        return bytearray(num_bytes)
    if len(getattr(_kept, "pixels", b"")) < num_bytes:
        _kept.pixels = bytearray(num_bytes)
    return _kept.pixels
