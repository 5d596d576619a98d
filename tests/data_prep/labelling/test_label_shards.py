"""Labels in separate files: same values as merged records; which steps run, and when again."""

import dataclasses
import json
import shutil

import fsspec
import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep.filter import run_filter
from data_prep.label import run_label
from data_prep.labelling.config import default_config
from data_prep.labelling.tasks import plan_outputs
from diht_jax.readers.registry import SourceShard
from diht_jax.records.formats import open_source
from diht_jax.records.labels.shards import open_labels
from diht_jax.records.schema import CONCEPT_FIELDS
from diht_jax.records.train_data import open_records
from diht_jax.records.vocabulary import find_train_vocabulary, find_vocabulary, read_vocabulary
from tests.data_prep.filtering.jobs import RAY_ENVIRONMENT, job_config, read_records
from tests.data_prep.labelling.pictures import NUM_IMAGES, label_config
from tests.make import REPOSITORY, run_command

_KEPT = ("embeddings", "heads", "vocabulary")


def _config(source, output, **changes):
    return label_config(source, output, merge=False, **changes)


def _joined(source, labels):
    records = open_source(str(source))
    rows = open_labels(str(labels), records, "labels")
    return [rows.join(records.decode(records[i]), i) for i in range(len(records))]


def _times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tfrecord")}


@pytest.fixture(scope="module")
def label_shards(work, tmp_path_factory):
    """Labels of `kept`, made from the embeddings and heads of `labelled`."""
    folder = tmp_path_factory.mktemp("label_shards") / "labels"
    folder.mkdir()
    for path in (work / "labelled").iterdir():
        if path.name.startswith(_KEPT):
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / path.name)
    before = _times(folder / "embeddings")
    assert run_label(_config(work / "kept", folder)) == {}
    assert _times(folder / "embeddings") == before
    return folder


def test_numbers_are_those_of_merged_records(work, label_shards):
    found, expected = _joined(work / "kept", label_shards), read_records(work / "labelled")
    assert len(found) == NUM_IMAGES
    for one, other in zip(found, expected, strict=True):
        for field in dataclasses.fields(one):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
        for name in (name for names in CONCEPT_FIELDS for name in names):
            assert getattr(one, name).dtype == getattr(other, name).dtype
    assert not list(label_shards.glob("*.tfrecord*"))
    summary = json.loads((label_shards / "stats.json").read_text())
    merged = json.loads((work / "labelled" / "stats.json").read_text())
    for name in ("records", "labelled", "unlabelled", "vocabulary", "teacher"):
        assert summary[name] == merged[name]
    size = sum(path.stat().st_size for path in (label_shards / "labels").glob("*.tfrecord"))
    assert summary["added_bytes_per_record"] * NUM_IMAGES == size
    assert find_train_vocabulary(str(label_shards)) == read_vocabulary(work / "labelled")


def test_merged_shards_of_another_run_are_refused(tmp_path):
    (tmp_path / "pairs-train-00002.tfrecord").touch()

    def plan(count):
        inputs = [SourceShard("tfrecord", f"{number}.tfrecord") for number in range(count)]
        return plan_outputs(inputs, str(tmp_path), "h", [None] * count, merged=default_config())

    with pytest.raises(ValueError, match="1 shards that do not belong.*pairs-train-00002"):
        plan(2)
    assert [task.name for task in plan(4)] == [f"pairs-train-{i:05d}.tfrecord" for i in range(4)]


# The teacher of the tests, which holds a batch until its node is lost.
_HELD = """
import pathlib, time, torch

class Held(torch.nn.Sequential):
    def forward(self, images):
        flag = pathlib.Path(__file__).with_name("hold")
        while flag.exists():
            flag.with_name("held").touch()
            time.sleep(0.02)
        return super().forward(images)

def build():
    return Held(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
"""
_ON_RAY = """
import json, pathlib, threading, time
import ray
from ray.cluster_utils import Cluster
from data_prep.label import run_label
from tests.data_prep.labelling.pictures import label_config

if __name__ == "__main__":
    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # Teachers are in actors that all workers share. They have room on one node alone, which is
    # lost while they are at work; another one joins. From a store to a store.
    config = label_config(
        "s3://bucket/ray/kept", "s3://bucket/ray/shared", merge=False, num_workers=0
    )
    config.report_images = 0
    config.ray.update({"address": cluster.address, "model_actors": 2, "gpus_per_model_actor": 2.0})
    models = cluster.add_node(num_cpus=0, num_gpus=4)
    pathlib.Path("hold").touch()

    def run():
        print("shared:", json.dumps(run_label(config, engine="ray")), flush=True)

    ray.init(address=cluster.address)
    thread = threading.Thread(target=run, daemon=True)  # nodes come and go in the main thread
    thread.start()
    while thread.is_alive() and not pathlib.Path("held").exists():
        time.sleep(0.02)
    cluster.remove_node(models, allow_graceful=False)
    pathlib.Path("hold").unlink()
    cluster.add_node(num_cpus=0, num_gpus=2)
    thread.join()
    ray.shutdown()
    cluster.shutdown()
"""


def test_actors_of_a_cluster_write_the_same_bytes(work, label_shards, tmp_path, s3_bucket):
    pytest.importorskip("ray")
    system = fsspec.filesystem("s3")
    system.put(str(work / "kept"), "bucket/ray/kept", recursive=True)
    (tmp_path / "quarters.py").write_text(_HELD)
    (tmp_path / "script.py").write_text(_ON_RAY)
    environment = RAY_ENVIRONMENT | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = run_command("script", devices=8, folder=tmp_path, **environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "shared: {}" in done.stdout
    assert not (tmp_path / "hold").exists()
    assert "a model actor died, or its node was lost" in done.stderr
    system.invalidate_cache()
    system.get("bucket/ray/shared", str(tmp_path / "shared"), recursive=True)
    for path in (*label_shards.glob("*/*.tfrecord"), label_shards / "heads.npz"):
        found = tmp_path / "shared" / path.relative_to(label_shards)
        assert found.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", ["array_record", "webdataset"])
def test_labels_are_those_of_tfrecords(work, tmp_path, name):
    config = job_config(str(work / "t.jsonl"), tmp_path / "kept", concepts=True, output_format=name)
    assert run_filter(config) == {}
    changes = {"heads__load": str(work / "labelled"), "output_format": "array_record"}
    config = label_config(tmp_path / "kept", tmp_path / "out", **changes)
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
    # A second run does nothing.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.array_record")}
    assert run_label(config) == {}
    assert before == {path: path.stat().st_mtime_ns for path in before}
