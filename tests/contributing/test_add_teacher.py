"""Worked example of a teacher: it labels a filtered folder; embeddings are checked by hand."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from data_prep.filter import run_filter
from data_prep.jobs.shards import ShardTask
from data_prep.label import run_label
from data_prep.labelling.embeddings import load_embeddings
from data_prep.teachers import registry
from diht_jax.config import load_recipe
from diht_jax.readers.registry import SourceShard
from diht_jax.records.vocabulary import read_vocabulary
from tests import make
from tests.contributing.blocks import load_example
from tests.data_prep.filtering.jobs import job_config, read_records

_COLORS = {"red": (230, 10, 20), "green": (10, 200, 30), "blue": (30, 20, 210)}
_NUM_IMAGES = 48


@pytest.fixture(autouse=True)
def teacher(tmp_path, monkeypatch):
    """Registers the example: one file, and one line in the table."""
    example = load_example("mean_color", tmp_path)
    monkeypatch.setitem(registry.TEACHERS, "mean_color", example.TEACHER)


def _write_filtered(folder: pathlib.Path) -> tuple[pathlib.Path, np.ndarray]:
    """A filtered folder and the expected embeddings [n, 12]: the colour of each quarter."""
    rng = np.random.default_rng(0)
    members, expected = {}, []
    for i in range(_NUM_IMAGES):
        name = list(_COLORS)[i % 3]
        quarters = rng.integers(0, 256, (2, 2, 3))
        quarters[0] = _COLORS[name]  # the upper half
        pixels = quarters.repeat(16, axis=0).repeat(16, axis=1).astype(np.uint8)
        image = make.encoded(Image.fromarray(pixels))
        members |= make.pair_members(f"{i:02d}", f"a {name} house in the rain", image)
        expected.append(quarters.ravel())
    source = make.write_tar(folder / "pairs.tar", members)
    config = job_config(source, folder / "kept", concepts=True)
    assert run_filter(config) == {}
    return folder / "kept", np.array(expected, np.float32)


def _config(kept: pathlib.Path, output: pathlib.Path):
    config = load_recipe(make.PREP_RECIPES / "concepts.py")  # has the section of the example
    config.update({"input": str(kept), "output": str(output), "num_workers": 0})
    config.teacher.kind = "mean_color"
    config.vocabulary.min_count = 5
    config.heads.update({"steps": 100, "batch_size": 32, "learning_rate": 0.05, "held_out": 0.25})
    config.report_images = 2
    config.merge = True
    return config


def test_labels_of_mean_colors(tmp_path):
    kept, expected = _write_filtered(tmp_path)
    output = tmp_path / "labelled"
    assert run_label(_config(kept, output)) == {}
    (path,) = output.glob("embeddings/*.tfrecord")
    # Nothing is resized, since the pictures have the teacher's size; float16 represents small
    # integers exactly.
    task = ShardTask(SourceShard("tfrecord", str(kept)), str(path), config_hash="")
    np.testing.assert_array_equal(load_embeddings(task).embeddings, expected)
    vocabulary = read_vocabulary(output)
    assert sorted(vocabulary.attributes.names) == sorted(_COLORS)
    for i, record in enumerate(read_records(output)):
        assert vocabulary.attributes.names[record.attribute_ids[0]] == list(_COLORS)[i % 3]
    summary = json.loads((output / "stats.json").read_text())
    assert summary["teacher"] == {"kind": "mean_color", "image_size": 32, "cells": 2}
    labelled = next(output.glob("*.tfrecord")).stat().st_mtime_ns
    assert run_label(_config(kept, output)) == {}  # nothing to do
    assert next(output.glob("*.tfrecord")).stat().st_mtime_ns == labelled
