"""The label command between formats of shards: the same records, whatever their shards are."""

import io
import json
import pathlib

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from data_prep.filter import run_filter
from data_prep.label import run_label
from diht_jax.config import load_recipe
from diht_jax.input.pipeline import open_records
from diht_jax.records.vocabulary import find_vocabulary, vocabulary_sizes

_RECIPES = pathlib.Path(__file__).resolve().parents[3] / "configs" / "prep"
_TEACHER = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
"""


def _label(source, output, **changes) -> ml_collections.ConfigDict:
    config = load_recipe(_RECIPES / "concepts.py")
    config.update({"input": str(source), "output": str(output), "num_workers": 0})
    config.teacher.update({"kind": "torch", "batch_size": 16})
    config.teacher.torch.update({"function": "means:build", "image_size": 8})
    config.vocabulary.min_count = 2
    config.heads.update({"steps": 3, "batch_size": 4, "held_out": 0.25})
    config.merge = True
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Twelve pictures, filtered into each format, and the TFRecords labelled."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "means.py").write_text(_TEACHER)
    rows = []
    for number in range(12):
        buffer = io.BytesIO()
        color = ("red", "blue")[number % 2]
        Image.new("RGB", (8, 8), color).save(buffer, "PNG")
        (folder / f"{number}.png").write_bytes(buffer.getvalue())
        rows.append({"image": f"{number}.png", "caption": f"a {color} car in the rain"})
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("tfrecord", "array_record", "webdataset"):
        config = load_recipe(_RECIPES / "convert.py")
        config.update({"input": str(folder / "t.jsonl"), "output": str(folder / name)})
        config.update({"num_workers": 0, "concepts": True, "output_format": name})
        config.examples_per_shard = 6
        assert run_filter(config) == {}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        assert run_label(_label(folder / "tfrecord", folder / "labelled")) == {}
        yield folder


@pytest.mark.parametrize("name", ["array_record", "webdataset"])
def test_labels_are_those_of_tfrecords(work, tmp_path, name):
    config = _label(work / name, tmp_path / "out", output_format="array_record")
    assert run_label(config) == {}
    found, expected = open_records(str(tmp_path / "out")), open_records(str(work / "labelled"))
    assert found.paths[0].endswith("pairs-train-00000.array_record") and len(found) == 12
    for number in range(12):
        one, other = found.decode(found[number]), expected.decode(expected[number])
        np.testing.assert_array_equal(one.object_ids, other.object_ids)
        np.testing.assert_array_equal(one.attribute_probs, other.attribute_probs)
        assert one.image == other.image
        if name == "array_record":
            assert found[number] == expected[number]
    assert vocabulary_sizes(str(tmp_path / "out")) == (2, 2)
    assert find_vocabulary(str(tmp_path / "out")) == find_vocabulary(str(work / "labelled"))
    builder = tfds.builder_from_directory(tmp_path / "out")
    example = builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})[
        7
    ]
    assert len(example["concepts"]) == 2 + 5 * 4
    # Nothing is done twice.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    assert run_label(config) == {}
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_tars_have_no_room_for_concepts(work, tmp_path):
    with pytest.raises(
        ValueError, match="output_format='webdataset'; expected one of tfrecord, ar"
    ):
        run_label(_label(work / "tfrecord", tmp_path / "out", output_format="webdataset"))
