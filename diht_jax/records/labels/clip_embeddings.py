"""Embeddings of every pair by frozen CLIP teachers, stored next to the record shards.

The label of a record (`shards.py`) has the features

    key        of the record
    seal       uint32, little-endian (`shards.seal`)
    image_emb  [k, D] of k views of the picture
    text_emb   [D] of the caption

as int8 or little-endian float16. D is the sum of the widths of all teachers, whose embeddings are
concatenated. In int8, each vector of a teacher is scaled to a maximum of 127. Norms are not stored:
embeddings are L2-normalised when they are used. A record that could not be embedded has none.

The views are k fixed crops, or the centre alone. A crop is a function of the seed, the record's key
and the number of the crop, so training shows the student exactly the crops that a teacher saw.

Source: the reinforced data of MobileCLIP, arXiv 2311.17049.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diht_jax.records.labels.shards import (
    CLIP_EMBEDDINGS,
    Label,
    LabelRecords,
    decode_features,
    encode_features,
    encode_key,
    read_labels_index,
)
from diht_jax.records.schema import Record
from diht_jax.records.train_data import parse_train, resolve_source

DTYPES = ("int8", "float16")

_KEY, _SEAL, _IMAGE, _TEXT = "key", "seal", "image_emb", "text_emb"
_LARGEST = 127  # largest int8


class ClipTeacher(NamedTuple):
    """A frozen CLIP teacher."""

    name: str  # argument of `load_model`
    fingerprint: str  # hash of the parameters
    width: int  # D, size of its embeddings
    image_size: int  # px
    logit_scale: float  # after exp


@dataclasses.dataclass(frozen=True)
class Crops:
    """The fixed crops of a record."""

    count: int  # k; 0 means one view, the centre
    scale: tuple[float, float]  # range of crop area / picture area
    seed: int  # seed of the crops
    boxes: str = ""  # a hash of some crops, to detect a changed random number generator

    @property
    def num_views(self) -> int:
        """Number of rows of `image_emb`."""
        return max(self.count, 1)

    def generator(self, key: str, number: int) -> np.random.Generator:
        """Returns the generator that draws one crop of a record."""
        text = f"{self.seed} {number} {key}".encode("utf-8", "surrogatepass")
        words = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8")
        return np.random.Generator(np.random.Philox(key=words))


class ClipViews(NamedTuple):
    """The stored embeddings of a record: `image_emb` [k, D] and `text_emb` [D]."""

    image_emb: np.ndarray
    text_emb: np.ndarray


@dataclasses.dataclass(frozen=True)
class ClipFacts:
    """The teachers, crops and dtype shared by all CLIP embeddings of a folder."""

    teachers: tuple[ClipTeacher, ...]  # in the order of their columns
    crops: Crops  # crops that the teachers saw
    dtype: str  # dtype of the stored numbers, one of `DTYPES`

    @property
    def width(self) -> int:
        """D, summed over all teachers."""
        return sum(teacher.width for teacher in self.teachers)

    @property
    def meaning(self) -> dict[str, Any]:
        """What the numbers mean, JSON-able; excludes the names of the teachers."""
        return {
            "teachers": [teacher[1:] for teacher in self.teachers],
            "crops": dataclasses.asdict(self.crops),
        }

    @property
    def hash(self) -> str:
        """16 hex digits of a hash of `meaning`."""
        text = json.dumps(self.meaning, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Returns a JSON-able form, for the index of the folder."""
        teachers = [teacher._asdict() for teacher in self.teachers]
        return {
            "teachers": teachers,
            "crops": dataclasses.asdict(self.crops),
            "dtype": self.dtype,
        }

    @classmethod
    def parse(cls, facts: Mapping[str, Any]) -> ClipFacts:
        """Inverts `describe`."""
        crops: dict[str, Any] = {**facts["crops"], "scale": tuple(facts["crops"]["scale"])}
        return cls(
            tuple(ClipTeacher(**teacher) for teacher in facts["teachers"]),
            Crops(**crops),
            facts["dtype"],
        )

    def encode(self, key: str, seal: int, vectors: np.ndarray | None) -> bytes:
        """Encodes the label of a record: float [views + 1, D] with the text last, or None."""
        named = {_KEY: encode_key(key), _SEAL: seal.to_bytes(4, "little")}
        if vectors is None:
            return encode_features(named)
        ends = np.cumsum([teacher.width for teacher in self.teachers])[:-1]
        parts = [quantize(part, self.dtype) for part in np.split(vectors, ends, axis=1)]
        stored = np.concatenate(parts, axis=1).astype(self._number)
        views = {_IMAGE: stored[:-1].tobytes(), _TEXT: stored[-1].tobytes()}
        return encode_features(named | views)

    def decode(self, label: Label, key: str) -> ClipViews | None:
        """Inverts `encode`; raises ValueError if the label does not belong to the record `key`."""
        found = decode_features(label.data)
        if found:  # empty if the whole shard could not be embedded
            label.check(int.from_bytes(found.get(_SEAL, b""), "little"), key)
        if _IMAGE not in found:
            return None
        try:
            image_emb = np.frombuffer(found[_IMAGE], self._number)
            text_emb = np.frombuffer(found[_TEXT], self._number).reshape(self.width)
            return ClipViews(image_emb.reshape(self.crops.num_views, self.width), text_emb)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"expected embeddings of {self.crops.num_views} views and a text, of {self.width} "
                f"numbers each ({error}); run data_prep.label again"
            ) from error

    @property
    def _number(self) -> np.dtype:
        return np.dtype({"int8": "i1", "float16": "<f2"}[self.dtype])


@dataclasses.dataclass(frozen=True)
class EmbeddedRecord(Record):
    """A record with its CLIP embeddings, None if it could not be embedded, and their crops."""

    clip_views: ClipViews | None = None
    crops: Crops | None = None


def quantize(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Converts a teacher's vectors, float [..., D], to the stored dtype; int8 loses their norm."""
    if dtype == "float16":
        return vectors.astype(np.float16)
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    return np.rint(vectors * (_LARGEST / np.where(largest > 0, largest, 1))).astype(np.int8)


class ClipEmbeddings(LabelRecords):
    """The CLIP embeddings of records."""

    kind = CLIP_EMBEDDINGS

    @functools.cached_property
    def clip_facts(self) -> ClipFacts:
        """The facts shared by all embeddings."""
        return ClipFacts.parse(self.facts)

    def _join(self, record: Record, label: Label) -> Record:
        views = self.clip_facts.decode(label, record.key)
        return EmbeddedRecord(**vars(record), clip_views=views, crops=self.clip_facts.crops)


def find_clip_embeddings(train: Any, labels: str | None) -> ClipFacts | None:
    """Returns the facts about the CLIP embeddings of the training data; None without embeddings.

    Raises:
        ValueError: sources have embeddings of different teachers or crops; names both.
    """
    found: dict[str, ClipFacts] = {}
    for source in map(resolve_source, parse_train(train, labels)):
        index = read_labels_index(CLIP_EMBEDDINGS, source.labels) if source.labels else None
        if source.labels and index is not None:
            found[source.labels] = ClipFacts.parse(index.labels["facts"])
    if len({facts.hash for facts in found.values()}) > 1:
        raise ValueError(
            f"config.data.train: the CLIP embeddings in {' and '.join(found)} are of different "
            "teachers or crops; label all sources with the same config.clip_teachers"
        )
    return next(iter(found.values()), None)
