"""Stored embeddings of CLIP teachers: student and teachers see the same pictures."""

import dataclasses
import functools
import io

import numpy as np
import pytest
from PIL import Image

from data_prep.label import run_label
from data_prep.labelling.config import check_config
from data_prep.labelling.config import default_config as label_defaults
from diht_jax import load_model
from diht_jax.config import default_config
from diht_jax.data.index import update_index
from diht_jax.data.tokenizer import tokenize
from diht_jax.input.choices import with_boxes
from diht_jax.input.examples import DecodeExample
from diht_jax.input.mixing import open_mixture
from diht_jax.records.formats import TFRecordSource
from diht_jax.records.labels.clip_embeddings import Crops
from diht_jax.records.schema import Record, decode_record
from diht_jax.training.objective import bind_data
from tests import make
from tests.data_prep.labelling.pictures import draw

LENGTHS = (7, 5)
_FEATURES = ("key", "image_emb", "text_emb")
BROKEN = 3  # its picture cannot be decoded
SCALE = (0.3, 1.0)
SIZES, WIDTHS = (16, 32), (12, 20)


def write_teacher(folder, seed, image_size, width):
    """Writes a work directory with random weights of a small CLIP."""
    config = default_config()
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.update(image_size=image_size, patch_size=8, embed_dim=width)
    config.model.overrides.update(vision_layers=1, text_layers=1)
    return make.write_run(folder, config, seed)


def label(folder, output="labels", **changes):
    config = label_defaults()
    config.update({"input": str(folder / "kept"), "output": str(folder / output)})
    config.update({"concepts": False, "num_workers": 0})
    models = ",".join(str(folder / name) for name in "ab")
    config.clip_teachers.update({"models": models, "crops": 3, "crop_scale": SCALE, **changes})
    return run_label(config)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for seed, (name, size, width) in enumerate(zip("ab", SIZES, WIDTHS, strict=True)):
        (folder / name).mkdir()
        write_teacher(folder / name, seed, size, width)
    rng = np.random.default_rng(0)
    records = [Record(f"key {i}", draw("red", "car", rng), f"car {i}") for i in range(sum(LENGTHS))]
    records[BROKEN] = dataclasses.replace(records[BROKEN], image=b"no picture")
    make.write_records(folder / "kept", records, LENGTHS)
    update_index(str(folder / "kept"))
    assert label(folder) == {}
    return folder


def batches(folder, size, count, seed=5, labels="labels", width=None):
    config = default_config()
    config.data.update({"train": str(folder / "kept"), "labels": str(folder / labels)})
    config.data.update({"batch_size": 4, "order": "global"})
    decoder = functools.partial(
        DecodeExample, size, 32, SCALE, fast_decode=False, teacher_width=width or sum(WIDTHS)
    )
    mixture = open_mixture(config.data, seed, lambda text: decoder(text))
    iterator = make.train_iterator(
        mixture, batch_size=4, seed=seed, num_workers=0, on_bad_record="skip"
    )
    found = [next(iterator) for _ in range(count)]
    iterator.close()
    return {name: np.concatenate([each[name] for each in found]) for name in found[0]}


def test_teachers_see_what_the_student_is_shown(work):
    """Recomputes the second teacher's embeddings from the pictures of the batch."""
    found = batches(work, SIZES[1], 6)
    model = load_model(work / "b")
    expected = model.encode_image(found["images"]), model.encode_text(found["tokens"])
    for name, right in zip(("teacher_image_emb", "teacher_text_emb"), expected, strict=True):
        stored = found[name][:, WIDTHS[0] :].astype(np.float64)
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        # The tolerance allows for half a quantisation step of int8 in each dimension.
        np.testing.assert_allclose(stored, right, atol=1.5 * np.abs(right).max() / 254)
    # Each record occurs in several views, and each view has its own embedding.
    views, embeddings = (
        {row.tobytes() for row in found[name]} for name in ("images", "teacher_image_emb")
    )
    assert len(views) == len(embeddings) > sum(LENGTHS)


def test_without_crops_teachers_see_the_whole_picture_and_the_student_its_own_crops(work):
    assert label(work, "centre", models=str(work / "b"), crops=0) == {}
    found = batches(work, SIZES[1], 6, labels="centre", width=WIDTHS[1])
    model = load_model(work / "b")
    for number, record in enumerate(map(decode_record, TFRecordSource(work / "kept"))):
        if number == BROKEN:
            continue
        is_record = np.all(found["tokens"] == tokenize(record.caption, 32), axis=1)
        stored = np.unique(found["teacher_image_emb"][is_record], axis=0).astype(np.float64)
        assert len(stored) == 1 < len(np.unique(found["images"][is_record], axis=0))
        picture = Image.open(io.BytesIO(record.image)).resize((SIZES[1],) * 2, Image.BICUBIC)
        right = model.encode_image(np.asarray(picture))
        stored /= np.linalg.norm(stored)
        np.testing.assert_allclose(stored, right, atol=1.5 * np.abs(right).max() / 254)
    config = default_config()
    config.affinity.weight = 1.0
    config.data.train, config.data.labels = str(work / "kept"), str(work / "centre")
    assert tuple(bind_data(config).affinity.widths) == WIDTHS[1:]  # with any data.crop_scale


def test_files_hold_every_record_and_are_made_once(work):
    """Reads the files with TensorFlow."""
    import tensorflow as tf  # slow; no other test here needs it

    paths = sorted((work / "labels" / "clip_embeddings").glob("*.tfrecord"))
    features = {name: tf.io.FixedLenFeature([], tf.string, "") for name in _FEATURES}
    found = [
        tf.io.parse_single_example(example, features)
        for example in tf.data.TFRecordDataset(list(map(str, paths)))
    ]
    assert [row["key"].numpy().decode() for row in found] == [f"key {i}" for i in range(12)]
    for number, row in enumerate(found):
        image_emb, text_emb = (tf.io.decode_raw(row[name], tf.int8) for name in _FEATURES[1:])
        sizes = (0, 0) if number == BROKEN else (3 * sum(WIDTHS), sum(WIDTHS))
        assert (len(image_emb), len(text_emb)) == sizes
    before = [path.stat().st_mtime_ns for path in paths]
    assert label(work) == {}
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_the_run_is_bound_to_its_teachers_and_crops(work):
    config = default_config()
    config.affinity.weight = 1.0
    config.data.train, config.data.labels = str(work / "kept"), str(work / "labels")
    with pytest.raises(ValueError, match=r"config.data.crop_scale=\(0.9, 1.0\): the teachers have"):
        bind_data(config)
    config.data.crop_scale = SCALE
    bound = bind_data(config)
    assert tuple(bound.affinity.widths) == WIDTHS
    np.testing.assert_allclose(bound.affinity.temperatures, [0.07, 0.07], rtol=1e-6)
    for key, value in (("captions", "sample"), ("caption_sentences", 1), ("caption_words", 8)):
        other = config.copy_and_resolve_references()
        other.data[key] = value
        with pytest.raises(ValueError, match=f"config.data.{key}='?{value}'?: the teachers have"):
            bind_data(other)
    config.affinity.teachers_hash = "other"
    with pytest.raises(ValueError, match="config.affinity.teachers_hash=other: the embeddings in"):
        bind_data(config)


def test_crops_do_not_change():
    """Crops are fixed for ever, since stored embeddings belong to them."""
    assert with_boxes(Crops(4, (0.5, 1.0), 7)).boxes == "1d746604c12f9cb7"


def test_an_unknown_dtype_is_refused_by_its_key():
    config = label_defaults()
    config.clip_teachers.dtype = "bf16"
    with pytest.raises(ValueError, match=r"config\.clip_teachers\.dtype=bf16"):
        check_config(config)
