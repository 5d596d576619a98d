"""The record against the protobuf classes that TFDS ships, and its refusals."""

import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from diht_jax.records.schema import Record, decode_record, encode_record

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
    # By hand: 3 objects, ids of three bytes, halves of two (0.5 is 0x3800); then 1 attribute.
    ids = "070000000000ffffff"
    probs = "003800340034"
    assert feature["concepts"].bytes_list.value[0].hex() == f"03{ids}{probs}01010000003c"
    assert set(feature) == {"key", "image", "caption", "metadata", "concepts"}
    # The other class writes the very same bytes: field numbers and packing agree.
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
