"""What frozen CLIPs make of every pair, in files beside the shards: `data_prep.label` writes them.

A folder that it writes with `config.clip_teachers.models` has

    clip_embeddings/NAME.npz   of the shard NAME: the array `clip_embeddings` [n], a row for each
                               record in its order, and `identity`, as a file of labels has it
    clip_embeddings.json       which files belong to which shards, the teachers, and the crops

A row has the fields `embedded` (uint8, 0 or 1), `image_emb` [k, D] of k views of the picture, and
`text_emb` [D] of the caption; D is the sum of the widths of all teachers, one behind the other.
In int8 a teacher's vector has 127 as its largest number. Its length is kept nowhere: embeddings are
L2-normalised where they are used.

The views are fixed crops, k of them, or the centre alone. A crop is a function of (seed, key of the
record, number), so that training shows the student the very crop that a teacher has seen.

Source: the reinforced data of MobileCLIP, arXiv 2311.17049.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diht_jax.records.catalog import Share
from diht_jax.records.labels.files import LabelFile, Sidecars, check_files
from diht_jax.records.labels.rows import LabelRows, check_listing, files_of_shards, resolve_source
from diht_jax.records.schema import Record
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.train_data import parse_train
from diht_jax.storage.files import read_bytes

CLIP_EMBEDDINGS = Sidecars("clip_embeddings", "clip_embeddings.json", "CLIP embeddings")
DTYPES = ("int8", "float16")

_FORMAT_VERSION = 1
_LARGEST = 127  # of int8


class ClipTeacher(NamedTuple):
    """A frozen CLIP.

    Attributes:
        name: as it was given to `load_model`.
        fingerprint: of its parameters.
        width: D, of its embeddings.
        image_size: px.
        logit_scale: after exp.
    """

    name: str
    fingerprint: str
    width: int
    image_size: int
    logit_scale: float


@dataclasses.dataclass(frozen=True)
class Crops:
    """The fixed crops of a record.

    Attributes:
        count: k; 0 stands for one view, the centre.
        scale: range of a crop's share of the picture's area.
        seed: of the crops.
        boxes: a hash of some crops, to notice another generator of random numbers.
    """

    count: int
    scale: tuple[float, float]
    seed: int
    boxes: str = ""

    @property
    def num_views(self) -> int:
        """Rows of `image_emb`."""
        return max(self.count, 1)

    def generator(self, key: str, number: int) -> np.random.Generator:
        """What draws a crop.

        Args:
            key: of the record.
            number: of the crop, in [0, count).
        """
        text = f"{self.seed} {number} {key}".encode("utf-8", "surrogatepass")
        words = np.frombuffer(hashlib.blake2b(text, digest_size=16).digest(), "<u8")
        return np.random.Generator(np.random.Philox(key=words))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `clip_embeddings.json` states.

    Attributes:
        teachers: in the order of their columns.
        crops: that they have seen.
        dtype: of the stored numbers, one of `DTYPES`.
        files: of all shards.
    """

    teachers: tuple[ClipTeacher, ...]
    crops: Crops
    dtype: str
    files: tuple[LabelFile, ...] = ()

    @property
    def width(self) -> int:
        """D of all teachers together."""
        return sum(teacher.width for teacher in self.teachers)

    @property
    def row_dtype(self) -> np.dtype:
        """Of a row."""
        number = {"int8": "i1", "float16": "<f2"}[self.dtype]
        views = self.crops.num_views
        fields = [("embedded", "u1"), ("image_emb", number, (views, self.width))]
        return np.dtype([*fields, ("text_emb", number, (self.width,))])

    @property
    def meaning(self) -> dict[str, Any]:
        """What the numbers mean, JSON-able; the names of the teachers do not matter."""
        return {
            "teachers": [teacher[1:] for teacher in self.teachers],
            "crops": dataclasses.asdict(self.crops),
        }

    @property
    def hash(self) -> str:
        """Of `meaning`."""
        text = json.dumps(self.meaning, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(self) -> bytes:
        """The contents of the file."""
        facts = {
            "format_version": _FORMAT_VERSION,
            "teachers": [teacher._asdict() for teacher in self.teachers],
            "crops": dataclasses.asdict(self.crops),
            "dtype": self.dtype,
            "columns": LabelFile._fields,
            "shards": self.files,
        }
        return json.dumps(facts, ensure_ascii=False).encode()

    @classmethod
    def parse(cls, data: bytes, path: str) -> Manifest:
        """The inverse of `encode`.

        Raises:
            ValueError: damaged, or of a later version; names the path.
        """
        try:
            facts = json.loads(data)
            if facts["format_version"] != _FORMAT_VERSION:
                raise ValueError(f"format version {facts['format_version']!r:.40}")
            crops = facts["crops"]
            manifest = cls(
                tuple(ClipTeacher(**teacher) for teacher in facts["teachers"]),
                Crops(**{**crops, "scale": tuple(crops["scale"])}),
                facts["dtype"],
                tuple(LabelFile(*row) for row in facts["shards"]),
            )
            check_files(manifest.files, manifest.row_dtype.itemsize)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a list of CLIP embeddings of `python -m data_prep.label` "
                f"({error!r:.200}); run that command again"
            ) from error
        return manifest


class ClipRows(LabelRows):
    """The rows of CLIP embeddings of a data set, by the number of the record.

    Attributes:
        manifest: without its files.
    """

    manifest: Manifest


@dataclasses.dataclass(frozen=True)
class EmbeddedRecord(Record):
    """A record with its row of CLIP embeddings."""

    clip_row: np.void | None = None


def quantize(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """Vectors of a teacher as they are stored.

    Args:
        vectors: float [..., D]; their length is lost.
        dtype: one of `DTYPES`.
    """
    if dtype == "float16":
        return vectors.astype(np.float16)
    largest = np.abs(vectors).max(axis=-1, keepdims=True)
    return np.rint(vectors * (_LARGEST / np.where(largest > 0, largest, 1))).astype(np.int8)


def decode_embedded(decode: Callable[[Any], Record], element: tuple[Any, np.void]) -> Record:
    """The record of an element and its row of `ClipRows`; errors as of `decode`."""
    data, row = element
    return EmbeddedRecord(**vars(decode(data)), clip_row=row)


def read_clip_manifest(folder: str) -> Manifest | None:
    """What `clip_embeddings.json` of a folder states; None where there is none."""
    path = os.path.join(folder, CLIP_EMBEDDINGS.manifest)
    try:
        return Manifest.parse(read_bytes(path), path)
    except FileNotFoundError:
        return None


def find_clip_embeddings(train: Any, labels: str | None) -> Manifest | None:
    """What the CLIP embeddings of the training data have in common; None where there are none.

    Args:
        train, labels: `config.data.train` and `config.data.labels`.

    Raises:
        ValueError: sources with embeddings of different teachers or crops; names both.
    """
    found: dict[str, Manifest] = {}
    for source in map(resolve_source, parse_train(train, labels)):
        manifest = read_clip_manifest(source.labels) if source.labels else None
        if manifest is not None:
            found[source.labels] = manifest
    if len({manifest.hash for manifest in found.values()}) > 1:
        raise ValueError(
            f"config.data.train: the CLIP embeddings in {' and '.join(found)} are of different "
            "teachers or crops; label all sources with the same config.clip_teachers"
        )
    return next(iter(found.values()), None)


def open_clip_embeddings(
    folder: str,
    records: ShardedRecords,
    key: str = "config.data.labels",
    *,
    share: Share | None = None,
    cache_dir: str | None = None,
    patiently: Callable[[Callable[[], Any]], Any] | None = None,
) -> ClipRows | None:
    """The CLIP embeddings of some records; None where the folder has none of any.

    Args:
        folder, records, key, share, cache_dir, patiently: as of `rows.open_labels`.

    Raises:
        ValueError: the folder lacks those of a shard, or has them of other records.
    """

    def read() -> bytes:
        manifest = read_clip_manifest(folder)
        if manifest is None:
            return b""
        check_listing(CLIP_EMBEDDINGS, manifest.files, folder, key)
        return manifest.encode()

    data = share(read) if share else read()
    if not data:
        return None
    manifest = Manifest.parse(data, os.path.join(folder, CLIP_EMBEDDINGS.manifest))
    files = files_of_shards(CLIP_EMBEDDINGS, manifest.files, records, f"{key}={folder}")
    rows = ClipRows(folder, files, manifest.row_dtype, cache_dir, patiently, CLIP_EMBEDDINGS)
    rows.manifest = dataclasses.replace(manifest, files=())
    return rows
