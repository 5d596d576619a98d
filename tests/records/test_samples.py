"""Records in img2dataset's layout, written with TensorFlow's own message."""

import math

import pytest
from tensorflow_datasets.proto import tf_example_pb2

from diht_jax.records.samples import SampleError
from diht_jax.records.schema import Pair, Record, decode_record, encode_record


def write_sample(sample: dict) -> bytes:
    """What img2dataset's `TFRecordSampleWriter` makes of a sample, by the types of the values."""
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
    # It can be written in our layout, and is the same then.
    assert decode_record(encode_record(record)) == record


def test_columns_with_the_names_of_our_fields_are_metadata():
    columns = {"image": 12, "metadata": "no json", "concepts": "cat", "object_ids": 3}
    sample = {"key": "1", "jpg": b"J", "txt": "a cat", **columns}
    assert decode_record(write_sample(sample)) == Record("1", b"J", "a cat", columns)
    sample["image"] = b"bytes, too"
    assert decode_record(write_sample(sample)).image == b"J"
    # Ours goes on to be ours, whatever else other writers put beside it.
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
    with pytest.raises(ValueError, match="one bytes value in field 'image', got 0; .*'caption'"):
        decode_record(write_sample({"key": "1", "caption": "a"}))
