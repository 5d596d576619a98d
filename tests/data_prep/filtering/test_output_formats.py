"""One filter job in every output format, read by the programs that use the formats."""

import io
import json
import pathlib
import tarfile
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from grain.sources import ArrayRecordDataSource
from PIL import Image

from data_prep.filter import run_filter
from diht_jax.readers.registry import open_source
from diht_jax.records.tar_records import INDEX, scan_tar
from diht_jax.records.train_data import open_records
from tests import make
from tests.data_prep.filtering.jobs import job_config, read_records, snapshot, write_table

_ENDINGS = {"tfrecord": ".tfrecord", "array_record": ".array_record", "webdataset": ".tar"}
_IMAGES = ("JPEG", "PNG", "WEBP", "JPEG", "JPEG", "PNG", "GIF", "JPEG", "PNG")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Nine pictures in each format, with keys that a tar cannot hold unchanged."""
    folder = tmp_path_factory.mktemp("formats")
    keys = ("a.b", "a.b", "x/../y", "a", "\u00e9", "a~2", "gif", "7", "8")
    rows, pictures = [], {}
    for number, (name, key) in enumerate(zip(_IMAGES, keys, strict=True)):
        pictures[str(number)] = make.encoded(make.noise(number, (42, 30), cell=6), name)
        row = {"image": str(number), "caption": f"picture {number}", "id": key, "n": number}
        rows.append(row)
    rows[3]["caption"] = ["picture 3", "another caption"]
    write_table(folder, rows, pictures)
    for name in _ENDINGS:
        assert run_filter(_config(folder, folder / name, name)) == {}
    return folder


def _config(work: pathlib.Path, output: pathlib.Path, output_format: str, **changes):
    changes = {"examples_per_shard": 5, "source__key_column": "id"} | changes
    return job_config(str(work / "t.jsonl"), output, output_format=output_format, **changes)


def _shards(folder: pathlib.Path, name: str) -> list[pathlib.Path]:
    return sorted(folder.glob(f"*{_ENDINGS[name]}"))


def test_grain_and_tfds_read_array_records(work):
    records = read_records(work / "tfrecord")
    paths = _shards(work / "array_record", "array_record")
    assert [path.name for path in paths] == [
        "pairs-train-00000.array_record",
        "pairs-train-00001.array_record",
    ]
    theirs = ArrayRecordDataSource([str(path) for path in paths])
    ours = open_records(str(work / "tfrecord"))
    assert [theirs[n] for n in range(len(theirs))] == [ours[n] for n in range(9)]
    builder = tfds.builder_from_directory(work / "array_record")
    examples = builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})
    assert builder.info.splits["train"].shard_lengths == [4, 5]
    for number in (0, 3, 8):
        example, record = examples[number], records[number]
        assert (example["key"], example["image"]) == (record.key.encode(), record.image)
        assert example["caption"] == record.caption.encode()
    assert list(open_source(str(work / "array_record"))) == records


def test_open_clip_trains_on_what_was_kept(work):
    open_clip = pytest.importorskip("open_clip")
    data = pytest.importorskip("open_clip_train.data")
    settings = types.SimpleNamespace(
        train_data=f"{work}/webdataset/pairs-train-{{00000..00001}}.tar",
        train_num_samples=None,  # taken from sizes.json
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=3,
        workers=0,
        world_size=1,
    )
    transform = open_clip.image_transform(30, is_train=False)
    loader = data.get_wds_dataset(
        settings, transform, is_train=True, tokenizer=lambda text: [text]
    ).dataloader
    assert loader.num_samples == 9
    records = {record.caption: record.image for record in read_records(work / "tfrecord")}
    found = {}
    for images, captions in loader:
        found |= dict(zip(captions, images, strict=True))
    assert found.keys() == records.keys()
    for caption, image in records.items():
        expected = transform(Image.open(io.BytesIO(image)))
        np.testing.assert_array_equal(found[caption], expected)


def test_tars_are_read_as_what_was_kept(work):
    records = read_records(work / "tfrecord")
    entries = list(open_source(str(work / "webdataset")))
    assert [entry.caption for entry in entries] == [record.caption for record in records]
    assert [entry.metadata for entry in entries] == [record.metadata for record in records]
    assert [record.metadata.get("captions") for record in records].count(None) == 8
    # Keys are unique within each tar, and no other program splits the names of members.
    assert [entry.key for entry in entries] == [
        *("a%2Eb", "a%2Eb~2", "x/%2E%2E/y", "a"),
        *("\u00e9", "a%7E2", "gif", "7", "8"),
    ]
    is_gif = [name == "GIF" for name in _IMAGES]
    for entry, record, gif in zip(entries, records, is_gif, strict=True):
        if gif:  # webdataset does not support GIF
            assert entry.image.startswith(b"\x89PNG")
            pixels = [Image.open(io.BytesIO(d)).convert("RGB") for d in (entry.image, record.image)]
            np.testing.assert_array_equal(*pixels)
        else:
            assert entry.image == record.image
    with tarfile.open(_shards(work / "webdataset", "webdataset")[0]) as tar:
        member = tar.getmember("a%2Eb~2.json")
        assert json.load(tar.extractfile(member)) == {"n": 1, "key": "a.b"}
        assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    # The index that the writer made equals the index from a scan of the tar.
    sizes = json.loads((work / "webdataset" / "sizes.json").read_text())
    for path in _shards(work / "webdataset", "webdataset"):
        offsets = scan_tar(str(path))
        assert sizes[path.name] == len(offsets)
        assert INDEX.load(str(path), path.stat().st_size).tolist() == offsets.tolist()


def test_another_format_needs_the_parts(work, tmp_path):
    output = tmp_path / "out"
    assert run_filter(_config(work, output, "tfrecord", keep_parts=True)) == {}
    expected = snapshot(work / "webdataset")
    assert run_filter(_config(work, output, "webdataset")) == {}
    assert not list(output.glob("*.tfrecord*")) and not (output / "dataset_info.json").exists()
    assert snapshot(output) == expected
    with pytest.raises(ValueError, match="1 input shards would have to be read again"):
        run_filter(_config(work, output, "array_record"))
    assert snapshot(output) == expected
