"""Tasks on TFDS names: data laid out as TFDS has COCO captions and CIFAR-10."""

import numpy as np
import pytest

from diht_jax.data.tfrecord import TFRecordWriter
from diht_jax.evaluation.task_specs import parse_tasks
from diht_jax.evaluation.tasks import evaluate_task

tfds = pytest.importorskip("tensorflow_datasets")


def _write_dataset(folder, features, examples):
    folder.mkdir(parents=True)
    name = folder.parent.name
    with TFRecordWriter(folder / f"{name}-test.tfrecord-00000-of-00001") as writer:
        for example in examples:
            writer.write(features.serialize_example(features.encode_example(example)))
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=name, split="test", filetype_suffix="tfrecord"
    )
    split = tfds.core.SplitInfo(
        name="test", shard_lengths=[len(examples)], num_bytes=0, filename_template=template
    )
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=features, split_infos=[split])


def test_coco_captions(tiny_model, tmp_path):
    kinds = tfds.features
    # The features of TFDS's builder, of which the first text is the name of a file.
    features = kinds.FeaturesDict(
        {
            "image": kinds.Image(encoding_format="png"),
            "image/filename": kinds.Text(),
            "captions": kinds.Sequence({"id": np.int64, "text": np.str_}),
            "objects": kinds.Sequence({"label": kinds.ClassLabel(num_classes=3)}),
        }
    )
    rng = np.random.default_rng(0)
    examples = [
        {
            "image": rng.integers(0, 255, (8, 8, 3), np.uint8),
            "image/filename": f"{i}.png",
            "captions": [{"id": j, "text": f"caption {j} of {i}"} for j in range(i + 1)],
            "objects": [{"label": 1}],
        }
        for i in range(4)
    ]
    _write_dataset(tmp_path / "coco_captions" / "1.0.0", features, examples)
    text = f"coco_retrieval=tfds:{tmp_path}/coco_captions/1.0.0:test?caption_feature=captions/text"
    counts = evaluate_task(tiny_model, *parse_tasks(text))["counts"]
    assert (counts["images"], counts["texts"], counts["different_texts"]) == (4, 10, 10)


def test_cifar10(tiny_model, tmp_path):
    names = ("airplane", "automobile", "bird")
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(32, 32, 3)),
            "label": tfds.features.ClassLabel(names=names),
        }
    )
    rng = np.random.default_rng(0)
    examples = [
        {"id": f"t{i}", "image": rng.integers(0, 255, (32, 32, 3), np.uint8), "label": i % 2 + 1}
        for i in range(5)
    ]
    _write_dataset(tmp_path / "cifar10" / "3.0.2", features, examples)
    (task,) = parse_tasks(f"cifar10=tfds:{tmp_path}/cifar10/3.0.2:test")
    result = evaluate_task(tiny_model, task)
    assert [entry["images"] for entry in result["per_class"]][:4] == [0, 3, 2, 0]
    assert result["counts"]["classes_without_images"] == 8
