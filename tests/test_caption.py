"""Captioning of shards: new captions are written next to the original ones."""

import copy
import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diht_jax import sharding
from diht_jax.caption import CaptionOptions, caption_shards
from diht_jax.config import default_config
from diht_jax.extras.captioning import CaptionDecoder
from diht_jax.input.transforms import decode_rgb
from diht_jax.models import get_architecture
from diht_jax.models.parameters import ModelDefinition, model_parameters
from diht_jax.records.dataset_info import STATS_SUFFIX
from diht_jax.records.formats import TFRecordSource, open_source
from diht_jax.records.labels.shards import NO_CONCEPTS
from diht_jax.records.schema import Example, Record, encode_record
from diht_jax.records.vocabulary import (
    ConceptList,
    Vocabulary,
    find_train_vocabulary,
    write_vocabulary,
)
from diht_jax.storage.files import temporary_path
from diht_jax.weights.inference import LoadedModel
from diht_jax.weights.source import ModelFiles
from tests import make
from tests.records.labels import write_labels


@pytest.fixture(scope="module")
def model():
    arch = get_architecture("tiny_32px", {"vision_layers": 1, "context_length": 6})
    definition = ModelDefinition(arch, jnp.float32, jnp.float32)
    decoder = model_parameters(CaptionDecoder(arch, 1, rngs=nnx.Rngs(params=jax.random.key(1))))
    config = default_config()
    config.model.dtype = "float32"
    params = jax.tree.map(jnp.asarray, make.draw_parameters(definition.init_params))
    files = ModelFiles(arch, params, "drawn", config=config, decoder=decoder)
    mesh = sharding.create_mesh(1, 1, jax.devices()[:1])
    return LoadedModel(definition, files, mesh, batch_size=8)


def records(count, first=0, labelled=True):
    for number in range(first, first + count):
        image = make.png(number, (36, 40))
        # Truncated after the header by which a tar identifies the image type.
        image = image[:200] if number == 3 else image
        labels = (np.int32([number]), np.float32([1.0])) if labelled else ()
        yield Record(f"r{number}", image, f"caption {number}", {"punsafe": 0.1}, *labels)


def write(folder, suffix="tfrecord"):
    folder.mkdir()
    labelled = suffix != "tar"  # a tar cannot hold labels
    return [
        str(make.write_shard(folder / f"{name}.{suffix}", records(count, first, labelled)))
        for name, count, first in (("a", 10, 0), ("b", 3, 20))
    ]


def read(folder):
    source = open_source(folder)
    return [source.decode(source[i]) for i in range(len(source))]


@pytest.mark.parametrize("suffix", ["tfrecord", "array_record", "tar"])
def test_records_have_the_captions_that_the_model_writes(model, tmp_path, suffix):
    shards = write(tmp_path / "in", suffix)
    caption_shards(model, shards, tmp_path / "out", CaptionOptions(kind="new"))
    before, after = read(tmp_path / "in"), read(tmp_path / "out")
    assert [record.key for record in after] == [record.key for record in before]
    for old, new in zip(before, after, strict=True):
        expected = old
        if old.key != "r3":
            (text,) = model.caption([decode_rgb(old.image)])
            metadata = {"captions": [old.caption, text], "caption_kinds": ["alt", "new"]}
            expected = dataclasses.replace(old, metadata={**old.metadata, **metadata})
        assert encode_record(new) == encode_record(expected)


def test_goes_on_where_it_was_and_leaves_no_half_shard(model, tmp_path, monkeypatch):
    shards = write(tmp_path / "in")
    options = CaptionOptions(num_captions=3, top_k=5, temperature=2.0)
    caption_shards(model, shards, tmp_path / "straight", options)
    calls, caption = [], LoadedModel.caption

    def failing(self, images, **settings):
        calls.append(len(images))
        if len(calls) == 6:  # after the check and the first shard's three captions
            raise RuntimeError("killed")
        return caption(self, images, **settings)

    monkeypatch.setattr(LoadedModel, "caption", failing)
    with pytest.raises(RuntimeError, match="killed"):
        caption_shards(model, shards, tmp_path / "out", options)
    assert {path.name for path in (tmp_path / "out").glob("*.tfrecord")} == {"a.tfrecord"}
    assert calls == [0, 9, 9, 9, 3, 3]
    caption_shards(model, shards, tmp_path / "out", options)
    assert calls[6:] == [0, 3, 3, 3]
    for name in ("a.tfrecord", "b.tfrecord"):
        straight = (tmp_path / "straight" / name).read_bytes()
        assert straight == (tmp_path / "out" / name).read_bytes()
    several = read(tmp_path / "out")[0].metadata["captions"]
    assert len(several) > 2, "draws that are all alike"


def test_a_shard_whose_input_has_changed_is_made_again(model, tmp_path):
    shards, output = write(tmp_path / "in"), tmp_path / "out"
    caption_shards(model, shards[:1], output, CaptionOptions())
    caption_shards(model, shards, output, CaptionOptions())  # one more shard
    made = (output / "b.tfrecord").stat().st_ino
    make.write_shard(shards[0], records(5, 40))
    caption_shards(model, shards, output, CaptionOptions())
    assert [record.key for record in read(output)[:5]] == [f"r{number}" for number in range(40, 45)]
    assert (output / "b.tfrecord").stat().st_ino == made
    # Like a filter run that divides the records differently, copied with old modification times.
    moved = list(records(4))
    for shard, own in zip(shards, (moved[:3], moved[3:]), strict=True):
        make.write_shard(shard, own)
        os.utime(shard, (0, 0))
    caption_shards(model, shards, output, CaptionOptions())
    assert [record.key for record in read(output)] == [record.key for record in moved]


def test_what_a_killed_run_has_left_is_removed_but_for_that_of_other_tasks(model, tmp_path):
    shards, output = write(tmp_path / "in"), tmp_path / "out"
    output.mkdir()
    left = [temporary_path(output / name) for name in ("a.tfrecord", "a.tfrecord.idx")]
    others = temporary_path(output / "b.tfrecord")
    for path in (*left, others):
        path.write_bytes(b"half a shard")
    caption_shards(model, shards, output, CaptionOptions(), task_index=0, num_tasks=2)
    assert [path for path in output.iterdir() if path.suffix == ".tmp"] == [others]


def test_errors(model, tmp_path):
    shards = write(tmp_path / "in")
    with pytest.raises(ValueError, match="holds the input, .*a.tfrecord; name another folder"):
        caption_shards(model, shards, tmp_path / "in", CaptionOptions())
    with pytest.raises(ValueError, match="two shards have the same name"):
        caption_shards(model, [*shards, shards[0]], tmp_path / "out", CaptionOptions())
    with pytest.raises(ValueError, match="top_k=0: expected 1 to"):
        caption_shards(model, shards, tmp_path / "out", CaptionOptions(top_k=0))
    caption_shards(model, shards[:1], tmp_path / "out", CaptionOptions())
    with pytest.raises(ValueError, match="captions made with other settings; changed: kind"):
        caption_shards(model, shards, tmp_path / "out", CaptionOptions(kind="new"))
    other = copy.copy(model)
    other._decoder = jax.tree.map(lambda leaf: leaf + 1, model._decoder)
    assert other.fingerprint() == model.fingerprint()
    with pytest.raises(ValueError, match="other settings; changed: model"):
        caption_shards(other, shards, tmp_path / "out", CaptionOptions())


def test_labels_within_records_keep_their_vocabulary(model, tmp_path):
    shards = write(tmp_path / "in")
    names = tuple(f"object {number}" for number in range(30))
    vocabulary = Vocabulary(
        ConceptList("objects", names, (1,) * len(names)), ConceptList("attributes", (), ())
    )
    stats = {"counts": {"kept": 3, "vocabulary": vocabulary.describe()}}
    for shard in shards:
        (tmp_path / "in" / f"{shard}{STATS_SUFFIX}").write_text(json.dumps(stats))
    write_vocabulary(tmp_path / "in", vocabulary)
    for index in (0, 1):
        caption_shards(
            *(model, shards, tmp_path / "out", CaptionOptions()), task_index=index, num_tasks=2
        )
    assert find_train_vocabulary(str(tmp_path / "out")) == vocabulary
    # Separate label shards belong to the records as they were.
    for shard in shards:
        (tmp_path / "in" / f"{shard}{STATS_SUFFIX}").unlink()
    nothing = [[NO_CONCEPTS, NO_CONCEPTS]] * len(TFRecordSource(tmp_path / "in"))
    write_labels(tmp_path / "in", tmp_path / "in", nothing, vocabulary)
    caption_shards(model, shards, tmp_path / "beside", CaptionOptions())
    assert find_train_vocabulary(str(tmp_path / "beside")) is None


def test_what_is_no_pair_is_left_out_and_counted(model, tmp_path, caplog):
    (good, empty, wrong), other = records(3), Example()
    empty = dataclasses.replace(empty, caption="")
    wrong = dataclasses.replace(wrong, metadata={"caption_kinds": ["alt", "alt"]})
    for name, data in (("key", b"img2dataset"), ("png", good.image), ("txt", b"")):
        other.features.feature[name].bytes_list.value.append(data)
    (tmp_path / "in").mkdir()
    written = (empty, wrong, other.SerializeToString(), good)
    shard = str(make.write_shard(tmp_path / "in" / "a.tfrecord", written))
    caption_shards(model, [shard], tmp_path / "out", CaptionOptions())
    found = {record.key: record for record in read(tmp_path / "out")}
    assert list(found) == ["r1", "r0"]
    # The record that had no caption has the new one as its caption.
    assert found["r1"].caption == model.caption([decode_rgb(empty.image)])[0]
    assert found["r1"].metadata == {"punsafe": 0.1, "caption_kinds": ["synthetic"]}
    assert "2 records are left out: damaged 1, no_caption 1" in caplog.text
    assert f"{shard}: record 1: record 'r2': expected the kind of each" in caplog.text
