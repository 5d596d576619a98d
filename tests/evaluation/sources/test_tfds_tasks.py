"""Tasks on TFDS names: data laid out as TFDS has COCO captions and CIFAR-10; names
of classes as TFDS has them."""

import numpy as np
import pytest

from diht_jax.evaluation.task_parsing import parse_tasks
from diht_jax.evaluation.tasks import evaluate_task
from diht_jax.records.tfrecord import TFRecordWriter

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


def _label_names(name, tmp_path):
    return tfds.builder(name, data_dir=tmp_path).info.features["label"].names


# What clip-benchmark calls otherwise than TFDS; each line is one class.
_RENAMED = {
    "caltech101": {
        "airplanes": "airplane",
        "background_google": "background",
        "car_side": "side of a car",
        "cougar_body": "body of a cougar cat",
        "cougar_face": "face of a cougar cat",
        "crocodile_head": "head of a  crocodile",
        "faces": "off-center face",
        "faces_easy": "centered face",
        "flamingo_head": "head of a flamingo",
        "leopards": "leopard",
        "motorbikes": "motorbike",
        "snoopy": "snoopy (cartoon beagle)",
        "yin_yang": "yin and yang symbol",
    },
    "flowers102": {
        "globe-flower": "globe flower",
        "pink-yellow dahlia?": "pink and yellow dahlia",
        "ball moss": "air plant",
    },
    "oxford_pets": {},
}


@pytest.mark.parametrize(
    ("task", "builder"),
    [
        ("caltech101", "caltech101"),
        ("flowers102", "oxford_flowers102"),
        ("oxford_pets", "oxford_iiit_pet"),
    ],
)
def test_names_of_clip_benchmark_have_the_order_of_tfds(task, builder, tmp_path):
    pytest.importorskip("clip_benchmark")
    names = _label_names(builder, tmp_path)
    expected = [_RENAMED[task].get(name, name.replace("_", " ")) for name in names]
    found = [name.casefold() for name in parse_tasks(task)[0].class_names]
    assert found == [name.casefold() for name in expected]
    # Another source numbers its labels as it likes.
    assert parse_tasks(f"{task}=/data/folder")[0].class_names is None
