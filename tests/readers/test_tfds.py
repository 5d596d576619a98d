"""TensorFlow and TFDS read our files, and we read theirs.

TensorFlow runs in one subprocess, which writes and reads everything that the tests then compare.
It must never be imported in the process that tests the training path.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from diht_jax.input.transforms import decode_rgb
from diht_jax.readers.registry import Skipped, list_shards, open_source, read_pairs
from diht_jax.records import dataset_info
from diht_jax.records.schema import Record
from diht_jax.records.shard_files import shard_name
from tests import make
from tests.make import encoded

_TENSORFLOW_SCRIPT = """
import io, json, pathlib, sys
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

work = pathlib.Path(sys.argv[1])
result = {}

def encode_png(value):
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 5, 3), value, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()

# 1. A folder of ours by TFDS; with images that it decodes, and with bytes.
for name in ("ours", "webp"):
    builder = tfds.builder_from_directory(work / name)
    rows = list(tfds.as_numpy(builder.as_dataset(split="train", shuffle_files=False)))
    result[name] = {
        "name": builder.info.name,
        "count": builder.info.splits["train"].num_examples,
        "keys": [row["key"].decode() for row in rows],
        "images": [
            [int(row["image"].sum()), list(row["image"].shape)]
            if isinstance(row["image"], np.ndarray) else row["image"].hex() for row in rows
        ],
        "num_objects": [row["concepts"][0] for row in rows if "concepts" in row],
    }

# 2. Data sets by TFDS.
def write(name, folder, features, splits, file_format="tfrecord"):
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version="3.0.1", features=tfds.features.FeaturesDict(features),
        split_datasets=splits, data_dir=str(work / folder), file_format=file_format,
    )

def captioned(count):
    for i in range(count):
        texts = [f"first {i}", f"second {i}"] if i else []
        yield i, {
            "image": io.BytesIO(encode_png(i)),
            "image/filename": f"{i}.png",
            "captions": [{"id": n, "text": text} for n, text in enumerate(texts)],
        }

for file_format in ("tfrecord", "array_record"):
    features = {  # as COCO captions
        "image": tfds.features.Image(),
        "image/filename": tfds.features.Text(),
        "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }
    splits = {"train": captioned(20), "val": captioned(3)}
    write("tiny_captions", file_format, features, splits, file_format)

# With name and version of a set that TFDS knows, so that its own code meets the files.
features = {
    "image": tfds.features.Image(shape=(28, 28, 1)),
    "label": tfds.features.ClassLabel(num_classes=10),
}
examples = [
    (i, {"image": np.full((28, 28, 1), 20 * i, np.uint8), "label": i % 10 if i else -1})
    for i in range(12)
]
write("mnist", "labels", features, {"train": examples})

(work / "result.json").write_text(json.dumps(result))
"""


def _make_record(index: int, image_format: str) -> Record:
    image = Image.new("RGB", (4 + index, 3), (index, 2 * index, 250))
    return Record(
        key=f"k{index}",
        image=encoded(image, image_format),
        caption=f"a “caption” {index}",
        metadata={"index": index},
        object_ids=np.arange(index, dtype=np.int32),
        object_probs=np.full(index, 0.125, np.float32),
        attribute_ids=np.zeros(0, np.int32),
        attribute_probs=np.zeros(0, np.float32),
    )


def _write_folder(folder: pathlib.Path, image_formats: list[str], shard_lengths: list[int]) -> None:
    folder.mkdir()
    index = 0
    for shard, length in enumerate(shard_lengths):
        name = shard_name("pairs", "train", shard, len(shard_lengths))
        numbers = range(index, index + length)
        formats = (image_formats[number % len(image_formats)] for number in numbers)
        make.write_shard(folder / name, map(_make_record, numbers, formats))
        index += length
    dataset_info.write_dataset_info(
        folder,
        dataset="pairs",
        split="train",
        shard_lengths=shard_lengths,
        num_bytes=sum(path.stat().st_size for path in folder.glob("*.tfrecord")),
        image_formats=image_formats,
        with_concepts=True,
    )


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
    """Runs the TensorFlow script, and returns its folder."""
    folder = tmp_path_factory.mktemp("tensorflow")
    _write_folder(folder / "ours", ["PNG"], [3, 0, 2])
    _write_folder(folder / "webp", ["PNG", "WEBP"], [2])
    # The script is a separate module, since TFDS looks for files next to a builder's source.
    (folder / "script").mkdir()
    (folder / "script" / "write_and_read.py").write_text(_TENSORFLOW_SCRIPT)
    script = subprocess.run(
        [sys.executable, str(folder / "script" / "write_and_read.py"), str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert script.returncode == 0, script.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def result(work) -> dict:
    return json.loads((work / "result.json").read_text())


def test_tfds_opens_our_folder(result):
    ours = result["ours"]
    assert (ours["name"], ours["count"]) == ("pairs", 5)
    assert ours["keys"] == [f"k{i}" for i in range(5)]
    sums = [(4 + i) * 3 * (i + 2 * i + 250) for i in range(5)]  # pixels times channels
    assert ours["images"] == [[sums[i], [3, 4 + i, 3]] for i in range(5)]
    assert ours["num_objects"] == list(range(5))


def test_tfds_gives_bytes_where_it_cannot_decode(result):
    files = [bytes.fromhex(image) for image in result["webp"]["images"]]
    assert files == [_make_record(0, "PNG").image, _make_record(1, "WEBP").image]


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_we_read_a_tfds_data_set(work, file_format):
    source = open_source("tfds:tiny_captions:train", data_dir=str(work / file_format))
    pairs = list(source)
    numbers = [int(pair.caption.split()[1]) for pair in pairs]
    assert sorted(numbers) == list(range(1, 20))
    assert source.skipped == {"no_caption": 1}
    for pair, number in zip(pairs, numbers, strict=True):
        assert pair.metadata == {"captions": [f"first {number}", f"second {number}"]}
        assert (np.asarray(decode_rgb(pair.image)) == number).all()
    assert len({pair.key for pair in pairs}) == 19


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_parts_of_a_split(work, file_format):
    def keys(split):
        shards = list_shards(f"tfds:tiny_captions:{split}", data_dir=str(work / file_format))
        return [entry.key for shard in shards for entry in read_pairs(shard)]

    whole = keys("train")
    assert len(whole) == 20
    assert keys("train[:25%]") == whole[:5]
    assert keys("train[5:]") == whole[5:]
    folder = work / file_format / "tiny_captions" / "3.0.1"
    entries = [e for s in list_shards(f"tfds:{folder}:val") for e in read_pairs(s)]
    assert len(entries) == 3
    assert sum(isinstance(entry, Skipped) for entry in entries) == 1


def test_labels_become_captions(work):
    source = open_source("tfds:mnist:train", data_dir=str(work / "labels"))
    pairs = list(source)
    assert len(pairs) == 11
    assert source.skipped == {"no_caption": 1}
    for pair in pairs:
        image = decode_rgb(pair.image)
        assert image.size == (28, 28)
        label = np.asarray(image)[0, 0, 0] // 20 % 10
        assert pair.metadata == {"label": label, "class_name": str(label)}
        assert pair.caption == str(label)


def test_features_can_be_named(work):
    options = {"data_dir": str(work / "tfrecord"), "caption_feature": "image/filename"}
    pairs = list(open_source("tfds:tiny_captions:val", **options))
    assert sorted(pair.caption for pair in pairs) == ["0.png", "1.png", "2.png"]
    with pytest.raises(ValueError, match="caption_feature='title' is none of captions/text"):
        open_source("tfds:tiny_captions:val", **options | {"caption_feature": "title"})


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:tiny_captions:test", "no split 'test'; there are train, val"),
        ("tfds:tiny_captions:1.0.0", "expected tfds:NAME:SPLIT"),
        ("tfds:mnist:train", "not prepared.*`tfds build mnist`"),
        ("tfds:./absent:train", "no dataset_info.json in './absent'"),
    ],
)
def test_wrong_names(work, spec, message):
    with pytest.raises(ValueError, match=message):
        open_source(spec, data_dir=str(work / "tfrecord"))


def test_reading_and_describing_need_no_tensorflow(work):
    code = f"""
import sys
from diht_jax.records import dataset_info
from diht_jax.readers.registry import open_source
for file_format in ("tfrecord", "array_record"):
    source = open_source("tfds:tiny_captions:val", data_dir={str(work)!r} + "/" + file_format)
    assert len(list(source)) == 2
dataset_info.write_dataset_info({str(work / "webp")!r}, dataset="pairs", split="train",
    shard_lengths=[2], num_bytes=1, image_formats=["JPEG"])
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=make.REPOSITORY)
