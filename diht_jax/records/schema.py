"""The record: one image-text pair as stored in a shard, and its two encodings.

It is the only contract between `data_prep` (writes) and `diht_jax` (reads). A record is a
serialised `tf.train.Example`, which TensorFlow and TFDS can also read. File access belongs in
`formats.py`, image decoding in `input/transforms.py`.

The concepts of a labelled record are packed into one field, `concepts`, which takes 102 bytes for
ten objects and ten attributes (four lists would take over 200). Objects come first::

    uint8 k | k x uint24 id | k x float16 probability        (little-endian)

Other writers may give the four lists `object_ids`, `object_probs`, `attribute_ids` and
`attribute_probs` (int64 and float) instead, which are also read.

The message classes are built here from a descriptor of TensorFlow's published `example.proto`
(same field numbers, hence the same bytes). TFDS ships the same descriptor, but importing it runs
all of `tensorflow_datasets`, in the training process and in each of its workers. This one needs
only `protobuf`, whose C parser takes about 8 microseconds for a 100 kB record.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

from diht_jax.records.samples import (
    IMAGE_EXTENSIONS,
    Pair,
    SampleError,
    Skipped,
    clean_text,
    take_caption,
)
from diht_jax.storage.files import parse_json

KEY = "key"
IMAGE = "image"
CAPTION = "caption"
METADATA = "metadata"
CONCEPTS = "concepts"
OBJECT_IDS = "object_ids"
OBJECT_PROBS = "object_probs"
ATTRIBUTE_IDS = "attribute_ids"
ATTRIBUTE_PROBS = "attribute_probs"

CONCEPT_FIELDS = ((OBJECT_IDS, OBJECT_PROBS), (ATTRIBUTE_IDS, ATTRIBUTE_PROBS))
_TEXT = "txt"  # the caption, in img2dataset's layout
_LISTS = ("bytes_list", "float_list", "int64_list")
MAX_CONCEPT_ID = 2**24 - 1
MAX_CONCEPTS = 255  # per kind and record


@dataclasses.dataclass(frozen=True)
class Record(Pair):
    """A pair with its distillation targets (DiHT, arXiv 2301.02280, "Concept Distillation").

    Attributes:
        object_ids: int32 [k], the teacher's likeliest objects, likeliest first. None before
            labelling, empty if the teacher found none.
        object_probs: float32 [k], their probabilities; a shard keeps 11 bits of each.
        attribute_ids: int32 [k], the same for attributes.
        attribute_probs: float32 [k].
    """

    object_ids: np.ndarray | None = None
    object_probs: np.ndarray | None = None
    attribute_ids: np.ndarray | None = None
    attribute_probs: np.ndarray | None = None


def encode_record(record: Pair) -> bytes:
    """Serialises a pair or a record; equal records give equal bytes.

    Args:
        record: the pair or record. Without concept fields, `concepts` is omitted. If only one kind
            of concepts is None, it is written as empty. Metadata is written as one JSON object.

    Returns:
        A serialised `tf.train.Example`.

    Raises:
        ValueError: the key or image is empty, text is not valid Unicode, metadata is not JSON, or
            concept ids and probabilities do not match.
    """
    if not record.key:
        raise ValueError("a record has an empty key; every pair needs one, to be named by")
    if not record.image:
        raise ValueError(f"record '{record.key}': the image is empty; expected encoded bytes")
    try:
        text = json.dumps(dict(record.metadata), sort_keys=True, allow_nan=False)
        values = [record.key.encode(), record.image, record.caption.encode(), text.encode()]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"record {record.key!r}: key or caption is no UTF-8, or the metadata no JSON "
            f"({error}); replace lone surrogates, and keep to str, int, finite float, bool, None, "
            "list and dict"
        ) from error
    example = Example()
    feature = example.features.feature
    for name, value in zip((KEY, IMAGE, CAPTION, METADATA), values, strict=True):
        feature[name].bytes_list.value.append(value)
    if isinstance(record, Record):
        concepts = [_pack_concepts(record, *names) for names in CONCEPT_FIELDS]
        if concepts != [None, None]:
            packed = b"".join(part or b"\0" for part in concepts)
            feature[CONCEPTS].bytes_list.value.append(packed)
    return example.SerializeToString(deterministic=True)


def decode_record(data: bytes) -> Record:
    """Decodes a record of `encode_record`, img2dataset, or any other writer of the same fields.

    Args:
        data: a serialised `tf.train.Example` with at least `key`, `image` and `caption`; or, as
            img2dataset writes it, with `key`, the image under its format's name, and `txt`.

    Raises:
        ValueError: the bytes are not a `tf.train.Example`, a field is missing or has a wrong type
            or invalid JSON, or concept ids and probabilities do not match.
    """
    return decode_fields(parse_example(data))


def parse_example(data: bytes) -> Mapping[str, Any]:
    """Parses a `tf.train.Example` into its fields by name; raises ValueError for other bytes."""
    try:
        return Example.FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(
            f"{len(data)} bytes that are no tf.train.Example ({error}); expected a shard written "
            "by `python -m data_prep.filter`"
        ) from error


def decode_fields(fields: Mapping[str, Any]) -> Record:
    """Decodes the fields of `parse_example` into a record; errors are those of `decode_record`.

    For img2dataset's layout, a record without image or caption raises SampleError.
    """
    if has_sample_fields(fields):
        return _read_sample_fields(fields)
    key = _decode_bytes(fields, KEY, "?").decode("utf-8", "replace")
    stated = _decode_bytes(fields, METADATA, key) if METADATA in fields else b""
    try:
        metadata = parse_json(stated) if stated else {}
    except ValueError as error:
        raise ValueError(
            f"record '{key}': field '{METADATA}' is no JSON object ({error})"
        ) from error
    if CONCEPTS in fields:
        concepts = _unpack_concepts(key, _decode_bytes(fields, CONCEPTS, key))
    else:  # the four lists of other writers; None if a field is absent
        concepts: dict[str, Any] = {}
        for ids_name, probs_name in CONCEPT_FIELDS:
            ids, probs = fields.get(ids_name), fields.get(probs_name)
            if ids is not None:
                ids = np.array(ids.int64_list.value, np.int64)
            if probs is not None:
                probs = np.array(probs.float_list.value, np.float32)
            concepts |= {ids_name: ids, probs_name: probs}
    for ids_name, probs_name in CONCEPT_FIELDS:
        ids, probs = concepts[ids_name], concepts[probs_name]
        if ids is not None or probs is not None:
            check_concepts(key, ids_name, ids, probs_name, probs, max_id=2**31 - 1)
            concepts[ids_name] = np.asarray(ids, np.int32)
    return Record(
        key=key,
        image=_decode_bytes(fields, IMAGE, key),
        caption=_decode_bytes(fields, CAPTION, key).decode("utf-8", "replace"),
        metadata=metadata,
        **concepts,
    )


def _pack_concepts(record: Record, ids_name: str, probs_name: str) -> bytes | None:
    ids, probs = getattr(record, ids_name), getattr(record, probs_name)
    if ids is None and probs is None:
        return None
    check_concepts(record.key, ids_name, ids, probs_name, probs)
    wide = np.asarray(ids).astype("<u4")
    id_bytes = wide.view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
    return bytes([wide.size]) + id_bytes + np.asarray(probs).astype("<f2").tobytes()


def check_concepts(
    key: str, ids_name: str, ids: Any, probs_name: str, probs: Any, max_id: int = MAX_CONCEPT_ID
) -> None:
    """Raises ValueError if ids (integer [k]) and probabilities do not match."""
    if ids is None or probs is None:
        missing = ids_name if ids is None else probs_name
        raise ValueError(f"record '{key}': {missing} is missing; ids and probabilities go together")
    ids, probs = np.asarray(ids), np.asarray(probs)
    if ids.ndim != 1 or ids.shape != probs.shape or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"record '{key}': expected {ids_name} integer [k] and {probs_name} float [k], got "
            f"{ids.dtype} {list(ids.shape)} and {probs.dtype} {list(probs.shape)}"
        )
    if ids.size > MAX_CONCEPTS:
        raise ValueError(
            f"record '{key}': {ids.size} entries in {ids_name}; at most {MAX_CONCEPTS} can be kept"
        )
    if ids.size and (ids.min() < 0 or ids.max() > max_id):
        raise ValueError(f"record '{key}': {ids_name} outside of [0, {max_id}]: {ids.tolist()}")
    if not np.all(np.isfinite(probs)) or np.any(probs < 0) or np.any(probs > 1.001):
        raise ValueError(
            f"record '{key}': {probs_name} must be finite, not negative and at most 1: "
            f"{probs.tolist()}"
        )


def _unpack_concepts(key: str, data: bytes) -> dict[str, np.ndarray]:
    concepts, rest = {}, data
    for ids_name, probs_name in CONCEPT_FIELDS:
        size = rest[0] if rest else 1
        part, rest = rest[1 : 1 + 5 * size], rest[1 + 5 * size :]
        if len(part) < 5 * size or (rest and ids_name == CONCEPT_FIELDS[-1][0]):
            raise ValueError(
                f"record '{key}': field '{CONCEPTS}' has {len(data)} bytes, too few or too many; "
                "label the data again"
            )
        digits = np.frombuffer(part, np.uint8, 3 * size).reshape(size, 3).astype(np.int32)
        concepts[ids_name] = digits @ np.array([1, 2**8, 2**16], np.int32)
        concepts[probs_name] = np.frombuffer(part, "<f2", size, 3 * size).astype(np.float32)
    return concepts


def _decode_bytes(fields: Any, name: str, key: str) -> bytes:
    value = _single_bytes(fields, name)
    if value is None:
        raise ValueError(
            f"record '{key}': expected one bytes value in field '{name}'; the record has the "
            f"fields {sorted(fields)}"
        )
    return value


def has_sample_fields(fields: Mapping[str, Any]) -> bool:
    """Returns whether a `tf.train.Example` has the layout of img2dataset rather than ours."""
    # img2dataset's may have a user's column "image", but ours has no `txt`.
    if IMAGE in fields and _TEXT not in fields:
        return False
    has_image = any(_single_bytes(fields, name) is not None for name in IMAGE_EXTENSIONS)
    return has_image or IMAGE not in fields and _TEXT in fields


def _read_sample_fields(fields: Mapping[str, Any]) -> Record:
    """Decodes the fields of img2dataset's layout into a record.

    Every field except the image, `txt`, `key` and the captions becomes metadata: texts and numbers
    that JSON can represent, None otherwise. `has_sample_fields` must be true of the fields.

    Raises:
        SampleError: the record does not have exactly one image, or has no caption.
        ValueError: the record has no key.
    """
    values = {name: _plain_value(fields[name]) for name in sorted(fields)}
    key = "" if values.get(KEY) is None else clean_text(str(values[KEY]))
    if not key:
        raise ValueError(f"a record without a key; it has the fields {sorted(fields)}")
    images = {name: _single_bytes(fields, name) for name in IMAGE_EXTENSIONS}
    images = {name: data for name, data in images.items() if data}
    if len(images) > 1:
        raise SampleError(Skipped(key, "duplicate", f"found {', '.join(images)}"))
    if not images:
        detail = f"nothing in a field {', '.join(IMAGE_EXTENSIONS)}"
        raise SampleError(Skipped(key, "no_image", detail))
    ((image_name, image),) = images.items()
    metadata = {k: v for k, v in values.items() if k not in (image_name, _TEXT)}
    caption, metadata = take_caption(_single_bytes(fields, _TEXT), metadata)
    if caption is None:
        raise SampleError(Skipped(key, "no_caption", "neither 'txt' nor 'caption' has one"))
    return Record(key, image, caption, metadata)


def _single_bytes(fields: Mapping[str, Any], name: str) -> bytes | None:
    # Test with `in` first, since indexing a protobuf map inserts missing keys.
    values = fields[name].bytes_list.value if name in fields else ()
    return values[0] if len(values) == 1 else None


def _plain_value(feature: Any) -> Any:
    """Returns the value of a field as JSON can represent it; a list if there are several."""
    for kind in _LISTS:
        values = [_plain(value) for value in getattr(feature, kind).value]
        if values:
            return values[0] if len(values) == 1 else values
    return None


def _plain(value: bytes | float | int) -> str | float | int | None:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, int) or math.isfinite(value) else None


# TensorFlow's published `example.proto`, as a descriptor in protobuf's text format.
_EXAMPLE_PROTO = """
name: "diht_jax/example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List"
  field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type { name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 label: LABEL_OPTIONAL oneof_index: 0
          type: TYPE_MESSAGE type_name: ".tensorflow.BytesList" }
  field { name: "float_list" number: 2 label: LABEL_OPTIONAL oneof_index: 0
          type: TYPE_MESSAGE type_name: ".tensorflow.FloatList" }
  field { name: "int64_list" number: 3 label: LABEL_OPTIONAL oneof_index: 0
          type: TYPE_MESSAGE type_name: ".tensorflow.Int64List" } }
message_type { name: "Features"
  nested_type { name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
    field { name: "value" number: 2 label: LABEL_OPTIONAL
            type: TYPE_MESSAGE type_name: ".tensorflow.Feature" } }
  field { name: "feature" number: 1 label: LABEL_REPEATED
          type: TYPE_MESSAGE type_name: ".tensorflow.Features.FeatureEntry" } }
message_type { name: "Example"
  field { name: "features" number: 1 label: LABEL_OPTIONAL
          type: TYPE_MESSAGE type_name: ".tensorflow.Features" } }
"""
# A separate pool avoids conflicts with the names that TensorFlow registers in the default pool.
_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(text_format.Parse(_EXAMPLE_PROTO, descriptor_pb2.FileDescriptorProto()))
Example = message_factory.GetMessageClass(_POOL.FindMessageTypeByName("tensorflow.Example"))
