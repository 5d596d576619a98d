"""The record against TFDS's protobuf classes, and records in img2dataset's layout."""

import math

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from diht_jax.records.samples import SampleError
from diht_jax.records.schema import Pair, Record, decode_record, encode_record

_IMAGE = bytes(range(256)) * 3


def _make_record() -> Record:
    return Record(
        key="00012",
        image=_IMAGE,
        caption="un café noir ☕",
        metadata={"label": 3, "captions": ["a", "b"], "nested": {"x": None, "y": 0.5}},
        object_ids=np.array([7, 0, 2**24 - 1], np.int32),
        object_probs=np.array([0.5, 0.25, 0.25], np.float32),
        attribute_ids=np.array([1], np.int64),
        attribute_probs=np.array([1.0], np.float32),
    )


def test_bytes_are_those_of_tensorflows_message():
    example = tf_example_pb2.Example.FromString(encode_record(_make_record()))
    feature = example.features.feature
    assert feature["key"].bytes_list.value == [b"00012"]
    assert feature["image"].bytes_list.value == [_IMAGE]
    assert feature["caption"].bytes_list.value == ["un café noir ☕".encode()]
    # By hand: 3 objects, ids of three bytes, float16 values (0.5 is 0x3800); then 1 attribute.
    ids = "070000000000ffffff"
    probs = "003800340034"
    assert feature["concepts"].bytes_list.value[0].hex() == f"03{ids}{probs}01010000003c"
    assert set(feature) == {"key", "image", "caption", "metadata", "concepts"}
    # The other class writes the same bytes: field numbers and packing agree.
    assert example.SerializeToString(deterministic=True) == encode_record(_make_record())


def test_reads_the_four_lists_of_other_writers():
    example = tf_example_pb2.Example()
    for name, value in {"key": b"k", "image": b"i", "caption": b"c"}.items():
        example.features.feature[name].bytes_list.value.append(value)
    for kind in ("object", "attribute"):
        example.features.feature[f"{kind}_ids"].int64_list.value.extend([3, 2**31 - 1])
        example.features.feature[f"{kind}_probs"].float_list.value.extend([0.75, 0.1])
    record = decode_record(example.SerializeToString())
    assert record.object_ids.tolist() == record.attribute_ids.tolist() == [3, 2**31 - 1]
    assert record.object_probs.tolist() == [0.75, np.float32(0.1)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": ""}, "empty key"),
        ({"caption": "lone \ud83d surrogate"}, "no UTF-8"),
        ({"metadata": {"x": float("nan")}}, "the metadata no JSON"),
        ({"object_ids": None}, "object_ids is missing"),
        ({"object_ids": np.array([1, 2, -1])}, "outside of"),
        (
            {"object_ids": np.zeros(256, int), "object_probs": np.zeros(256)},
            "256 entries in object_ids; at most 255",
        ),
        ({"object_probs": np.array([0.5, np.nan, 0.0])}, "finite"),
    ],
)
def test_refuses_to_encode(changes, message):
    record = Record(**{**_make_record().__dict__, **changes})
    with pytest.raises(ValueError, match=message) as error:
        encode_record(record)
    if changes.get("key") != "":
        assert "00012" in str(error.value)


def write_sample(sample: dict) -> bytes:
    """Returns what img2dataset's `TFRecordSampleWriter` writes for a sample, by value type."""
    example = tf_example_pb2.Example()
    for name, value in sample.items():
        feature = example.features.feature[name]
        if isinstance(value, list):
            feature.bytes_list.value.extend(value)
        elif isinstance(value, int):
            feature.int64_list.value.append(value)
        elif isinstance(value, float):
            feature.float_list.value.append(value)
        else:
            text = "" if value is None else value
            feature.bytes_list.value.append(text.encode() if isinstance(text, str) else text)
    return example.SerializeToString()


def test_a_sample_of_img2dataset_becomes_a_record():
    sample = {
        "key": b"000000007",
        "webp": b"RIFF\xff\x00",
        "txt": " un café ☕\n",
        "caption": "un café ☕",
        "url": "http://x/é",
        "error_message": None,
        "width": 60,
        "similarity": 0.25,
        "damaged": math.nan,
        "exif": b"\xff\xfe",
    }
    record = decode_record(write_sample(sample))
    assert (record.key, record.image, record.caption) == (
        "000000007",
        b"RIFF\xff\x00",
        "un café ☕",
    )
    assert record.metadata == {
        "url": "http://x/é",
        "error_message": "",
        "width": 60,
        "similarity": 0.25,
        "damaged": None,
        "exif": "\ufffd\ufffd",
    }
    assert record.object_ids is None
    # The record survives a round trip through our layout.
    assert decode_record(encode_record(record)) == record


def test_columns_with_the_names_of_our_fields_are_metadata():
    columns = {"image": 12, "metadata": "no json", "concepts": "cat", "object_ids": 3}
    sample = {"key": "1", "jpg": b"J", "txt": "a cat", **columns}
    assert decode_record(write_sample(sample)) == Record("1", b"J", "a cat", columns)
    sample["image"] = b"bytes, too"
    assert decode_record(write_sample(sample)).image == b"J"
    # Our layout is recognised even with fields that other writers add.
    ours = {"key": "1", "image": b"I", "caption": "a cat", "jpg": b"J"}
    assert decode_record(write_sample(ours)).image == b"I"
    assert decode_record(encode_record(Pair("1", b"I", "a cat"))).image == b"I"


@pytest.mark.parametrize(
    ("texts", "caption", "captions"),
    [
        ({"txt": "", "caption": "from the column"}, "from the column", None),
        ({"caption": "no txt"}, "no txt", None),
        ({"txt": "first", "captions": [b"second", b"first"]}, "first", ["first", "second"]),
        ({"txt": "\ufeffmark", "caption": "not this"}, "mark", None),
        ({"txt": b"\xff broken"}, "\ufffd broken", None),
    ],
)
def test_captions_come_from_the_txt_first(texts, caption, captions):
    record = decode_record(write_sample({"key": "1", "jpg": b"J", **texts}))
    assert (record.caption, record.metadata.get("captions")) == (caption, captions)


@pytest.mark.parametrize(
    ("sample", "reason", "message"),
    [
        ({"key": "1", "jpg": b"J", "txt": " "}, "no_caption", "record '1': no caption .'txt'|"),
        ({"key": "1", "txt": "a"}, "no_image", "record '1': no image .nothing in a field jpg"),
        ({"key": "1", "png": b"P", "jpg": b"J", "txt": "a"}, "duplicate", "found jpg, png"),
    ],
)
def test_incomplete_samples_are_named(sample, reason, message):
    with pytest.raises(SampleError, match=message) as error:
        decode_record(write_sample(sample))
    assert (error.value.skipped.key, error.value.skipped.reason) == ("1", reason)


def test_keys():
    sample = {"jpg": b"J", "txt": "a"}
    assert decode_record(write_sample({"key": 0, **sample})).key == "0"
    with pytest.raises(ValueError, match="without a key; it has the fields .'jpg', 'txt'"):
        decode_record(write_sample(sample))
    with pytest.raises(ValueError, match="one bytes value in field 'image'; .*'caption'"):
        decode_record(write_sample({"key": "1", "caption": "a"}))
