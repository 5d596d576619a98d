"""Concept labels beside a data set: a small file for each shard, joined as its records are read.

A folder that `data_prep.label` writes has

    labels/NAME.npz   of the shard NAME: the array `labels` [n], a row for each record in its order,
                      and `identity`, which shard that is and what the ids mean, as JSON
    labels.json       which files belong to which shards, for all of them at once
    vocabulary_*.tsv  what the ids mean

A row has the fields `labelled` (uint8, 0 or 1) and `object_ids`, `object_probs`, `attribute_ids`,
`attribute_probs`: k ids, likeliest first, as uint16 (uint32 for a vocabulary above 65,536), and k
float16 probabilities: 81 bytes for ten of each kind. A record in a shard keeps float16 as well, so
that joined labels are those of merged records to the bit. `np.load` reads the files; training
reads single rows of them, and opens a file when a record of its shard is read.

A shard is known by its name, records, bytes and digest, as in `fingerprint.py`. So the labels of
other records are noticed at the start, and the shards may lie anywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import posixpath
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diht_jax.records.schema import CONCEPT_FIELDS, MAX_CONCEPTS
from diht_jax.storage.files import read_bytes
from diht_jax.storage.stores import is_remote

FOLDER = "labels"
MANIFEST = "labels.json"
SUFFIX = ".npz"


class Sidecars(NamedTuple):
    """One kind of files beside shards.

    Attributes:
        folder: that the files lie in.
        manifest: lists them.
        what: they hold, in messages.
    """

    folder: str
    manifest: str
    what: str


LABELS = Sidecars(FOLDER, MANIFEST, "labels")

_FORMAT_VERSION = 1
# In the header of a member of a zip archive, of 30 bytes: the lengths of its name and extra field.
_ZIP_HEADER_BYTES = 30
_ZIP_LENGTHS = struct.Struct("<HH")
_ZIP_LENGTHS_AT = 26


class LabelFile(NamedTuple):
    """A file of labels, and the shard that it belongs to.

    Attributes:
        name, records, num_bytes, digest: of the shard, as in a `Fingerprint`.
        file: name of the file.
        file_bytes, file_digest: its size, and 16 hex digits of its contents.
        rows_at: its byte where the rows begin.
    """

    name: str
    records: int
    num_bytes: int
    digest: str
    file: str
    file_bytes: int
    file_digest: str
    rows_at: int

    @property
    def identity(self) -> tuple[str, int, int, str]:
        """Of the shard, as a row of a `Fingerprint`."""
        return self.name, self.records, self.num_bytes, self.digest


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `labels.json` states.

    Attributes:
        inputs: paths or URLs of the labelled records; relative ones begin in the folder of the
            labels, so that both may be copied elsewhere.
        vocabulary: of `Vocabulary.describe`.
        sizes: k of the objects, and of the attributes.
        files: of all shards.
    """

    inputs: tuple[str, ...]
    vocabulary: Mapping[str, Any]
    sizes: tuple[int, int]
    files: tuple[LabelFile, ...]

    @property
    def dtype(self) -> np.dtype:
        """Of a row."""
        return row_dtype(self.vocabulary, self.sizes)

    def check(self) -> None:
        """Raises ValueError, TypeError or KeyError where its values contradict each other."""
        if len(self.sizes) != 2 or not all(0 <= k <= MAX_CONCEPTS for k in self.sizes):
            raise ValueError(f"sizes {self.sizes!r:.80}")
        check_files(self.files, self.dtype.itemsize)

    def encode(self) -> bytes:
        """The contents of the file."""
        facts = {
            "format_version": _FORMAT_VERSION,
            "inputs": self.inputs,
            "vocabulary": self.vocabulary,
            "sizes": self.sizes,
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
            files = tuple(LabelFile(*row) for row in facts["shards"])
            sizes = tuple(facts["sizes"])
            manifest = cls(tuple(map(str, facts["inputs"])), facts["vocabulary"], sizes, files)
            manifest.check()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{path}: not a list of labels of `python -m data_prep.label` ({error!r:.200}); "
                "run that command again"
            ) from error
        return manifest


def check_files(files: Sequence[LabelFile], row_bytes: int) -> None:
    """Raises ValueError or TypeError where the values of a file contradict each other."""
    for file in files:
        end = file.rows_at + file.records * row_bytes
        if min(file.rows_at, file.records) < 0 or end > file.file_bytes:
            raise ValueError(f"{file.file}: its rows do not lie in {file.file_bytes} bytes")
        if "/" in file.file or file.file in ("", ".", ".."):
            raise ValueError(f"{file.file!r:.80} is no name of a file")


def row_dtype(vocabulary: Mapping[str, Any], sizes: Sequence[int]) -> np.dtype:
    """The fields of a row.

    Args:
        vocabulary: of `Vocabulary.describe`: sizes of the kinds, which decide the type of ids.
        sizes: k of the objects, and of the attributes.
    """
    largest = max(part["size"] for part in vocabulary.values())
    id_type = "<u2" if largest <= 2**16 else "<u4"
    fields: list[tuple] = [("labelled", "u1")]
    for (ids, probs), k in zip(CONCEPT_FIELDS, sizes, strict=True):
        fields += [(ids, id_type, (k,)), (probs, "<f2", (k,))]
    return np.dtype(fields)


def encode_labels(
    name: str,
    shard: tuple[str, int, int, str],
    vocabulary: Mapping[str, Any],
    sizes: Sequence[int],
    rows: np.ndarray,
    predicted: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[bytes, LabelFile]:
    """The file of one shard; equal labels give equal bytes.

    Args:
        name: of the file.
        shard: name, records, bytes and digest, as in a `Fingerprint`.
        vocabulary: of `Vocabulary.describe`.
        sizes: k of the objects, and of the attributes.
        rows: int [m], the records that are labelled.
        predicted: of the objects, and of the attributes: ids int [m, k] and probabilities [m, k].

    Returns:
        Its contents, and what the manifest states of it.
    """
    labels = np.zeros(shard[1], row_dtype(vocabulary, sizes))
    if len(rows):
        labels["labelled"][rows] = 1
        for names, arrays in zip(CONCEPT_FIELDS, predicted, strict=True):
            for field, array in zip(names, arrays, strict=True):
                labels[field][rows] = array
    return encode_rows(name, shard, labels, {"vocabulary": vocabulary})


def encode_rows(
    name: str,
    shard: tuple[str, int, int, str],
    rows: np.ndarray,
    meaning: Mapping[str, Any],
    member_name: str = "labels",
) -> tuple[bytes, LabelFile]:
    """The file of one shard with a row for each of its records; equal rows give equal bytes.

    Args:
        name: of the file.
        shard: name, records, bytes and digest, as in a `Fingerprint`.
        rows: [n], of a structured type.
        meaning: of the rows, JSON-able; stands in the file's `identity`.
        member_name: of the array in the file.
    """
    identity = {"shard": shard, **meaning}
    text = np.bytes_(json.dumps(identity, sort_keys=True))
    buffer = io.BytesIO()
    np.savez(buffer, **{member_name: rows}, identity=text)
    data = buffer.getvalue()
    with zipfile.ZipFile(buffer) as archive:
        member = archive.getinfo(f"{member_name}.npy")
    lengths = _ZIP_LENGTHS.unpack_from(data, member.header_offset + _ZIP_LENGTHS_AT)
    end = member.header_offset + _ZIP_HEADER_BYTES + sum(lengths) + member.file_size
    digest = hashlib.sha256(data).hexdigest()[:16]
    file = LabelFile(*shard, name, len(data), digest, end - rows.nbytes)
    return data, file


def relative_input(path: str, folder: str) -> str:
    """How a manifest names an input: from the folder of the labels, if they lie in one system."""
    (system, path_there), (own, folder_there) = _split(path), _split(folder)
    return posixpath.relpath(path_there, folder_there) if system == own else path


def find_input(text: str, folder: str) -> str:
    """The inverse of `relative_input`, wherever the folder lies now."""
    if is_remote(text) or os.path.isabs(text):
        return text
    system, folder_there = _split(folder)
    return f"{system}{posixpath.normpath(posixpath.join(folder_there, text))}"


def _split(path: str) -> tuple[str, str]:
    """The protocol of a URL, or nothing, and the absolute path behind it."""
    if is_remote(path):
        system, _, rest = path.partition("://")
        return f"{system}://", rest
    return "", os.path.abspath(path)


def read_manifest(folder: str, key: str = "config.data.labels") -> Manifest:
    """What `labels.json` of a folder states.

    Args:
        folder: path or URL, as `data_prep.label` has written it.
        key: of the config, for messages.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        return Manifest.parse(read_bytes(path), path)
    except FileNotFoundError as error:
        raise ValueError(
            f"{key}={folder}: {MANIFEST} is missing; expected the output folder of a run of "
            "`python -m data_prep.label` that was finished"
        ) from error
