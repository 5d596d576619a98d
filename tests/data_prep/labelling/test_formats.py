"""The label command between formats of shards: the same labels for any format."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep.filter import run_filter
from data_prep.label import run_label
from diht_jax.records.train_data import open_records
from diht_jax.records.vocabulary import find_vocabulary
from tests.data_prep.filtering.jobs import job_config
from tests.data_prep.labelling.pictures import NUM_IMAGES, label_config


def _label(work, source, output, **changes):
    return label_config(source, output, heads__load=str(work / "labelled"), **changes)


@pytest.mark.parametrize("name", ["array_record", "webdataset"])
def test_labels_are_those_of_tfrecords(work, tmp_path, name):
    config = job_config(str(work / "t.jsonl"), tmp_path / "kept", concepts=True, output_format=name)
    assert run_filter(config) == {}
    config = _label(work, tmp_path / "kept", tmp_path / "out", output_format="array_record")
    assert run_label(config) == {}
    found, expected = open_records(str(tmp_path / "out")), open_records(str(work / "labelled"))
    assert found.paths[0].endswith("pairs-train-00000.array_record") and len(found) == NUM_IMAGES
    for number in range(NUM_IMAGES):
        one, other = found.decode(found[number]), expected.decode(expected[number])
        np.testing.assert_array_equal(one.object_ids, other.object_ids)
        np.testing.assert_array_equal(one.attribute_probs, other.attribute_probs)
        assert one.image == other.image
        if name == "array_record":
            assert found[number] == expected[number]
    assert find_vocabulary(str(tmp_path / "out")) == find_vocabulary(str(work / "labelled"))
    builder = tfds.builder_from_directory(tmp_path / "out")
    source = builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source[7]["concepts"]) == 2 + 5 * 6
    # Nothing is done twice.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    assert run_label(config) == {}
    assert before == {path: path.stat().st_mtime_ns for path in before}
