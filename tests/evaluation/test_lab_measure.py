"""The laboratory's measures of a student equal the evaluation's, item by item."""

import numpy as np
import pytest

from benchmarks.lab.composition import wrong_captions
from benchmarks.lab.measure import measure_scenes, unpack_items
from data_prep.synthetic import captions, web
from diht_jax.evaluation.embedding.encoding import Encoder
from diht_jax.evaluation.protocols import classification, retrieval
from diht_jax.evaluation.protocols.base import Task
from diht_jax.readers.registry import open_source


def test_scenes_shapes_and_colours(tiny_model, tmp_path):
    settings = web.Settings(num_pairs=0, num_retrieval=24, num_classification=12)
    web.write_dataset(settings, tmp_path, workers=1)
    metrics, items = measure_scenes(tiny_model, {"web": tmp_path})
    task = Task("x", "retrieval", f"{tmp_path}/val_retrieval.tar", caption_template="{caption}")
    truth = retrieval.run(task, Encoder(tiny_model, open_source(task.source)))
    assert metrics["scenes/t2i_r1"] == truth.metrics["t2i_r1"]
    both = [truth.metrics["t2i_r10"], truth.metrics["i2t_r10"]]
    assert metrics["scenes/r10"] == pytest.approx(np.mean(both))
    found = [unpack_items(each) for each in items["scenes/r10"]]
    np.testing.assert_array_equal(found, [truth.result.t2i_ranks < 10, truth.result.i2t_ranks < 10])
    source, templates = f"{tmp_path}/val_color.tar", tuple(captions.COLOR_TEMPLATES)
    task = Task("x", "classification", source, templates=templates)
    colors = classification.run(task, Encoder(tiny_model, open_source(task.source)))
    assert metrics["color/top1"] == colors.metrics["top1"]
    for name, lists in items.items():
        assert metrics[name] == pytest.approx(np.mean([unpack_items(each) for each in lists]))


def _scene(relation, *objects):
    names = ("size", "texture", "color", "shape")
    described = [dict(zip(names, words.split(), strict=True)) for words in objects]
    return {"relation": relation, "objects": described}


def test_wrong_captions_by_hand():
    scene = _scene("chasing", "small plain red circle", "large striped blue star")
    found = wrong_captions("a small red circle is chasing a large striped blue star", scene)
    replaced = {kind: found.pop(kind) for kind in ("replace_color", "replace_shape")}
    assert found == {
        "swap_color": "a small blue circle is chasing a large striped red star",
        "swap_shape": "a small red star is chasing a large striped blue circle",
        "swap_objects": "a large striped blue star is chasing a small red circle",
    }
    said = {word for item in scene["objects"] for word in item.values()}
    for kind, words in (("replace_color", ("red", "blue")), ("replace_shape", ("circle", "star"))):
        new = set(replaced[kind].split()) - said - {"a", "is", "chasing"}
        assert len(new) == 1 and not new & set(words)
    # A swap that leaves the caption true is not asked: "side by side" is symmetric.
    scene = _scene("beside", "small plain red star", "small plain blue star")
    found = wrong_captions("a small red star sitting beside a small blue star", scene)
    assert sorted(found) == ["replace_color", "replace_shape"]
    scene = _scene("inside", "small plain red star", "small plain red star")
    assert wrong_captions("a small red star inside a small red star", scene) == {}
