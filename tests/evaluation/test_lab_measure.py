"""What the laboratory measures of a student is what the evaluation gives, item by item."""

import numpy as np
import pytest

from benchmarks.lab.measure import measure_emoji, measure_scenes, unpack_items
from data_prep.synthetic import captions, web
from diht_jax.data.readers.registry import open_source
from diht_jax.evaluation.protocols.classification import classify
from diht_jax.evaluation.protocols.retrieval import retrieve


@pytest.fixture(scope="module")
def small_web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    settings = web.Settings(num_pairs=0, num_retrieval=24, num_classification=12)
    web.write_dataset(settings, folder, workers=1)
    return folder


def test_scenes_shapes_and_colours(tiny_model, small_web):
    metrics, items = measure_scenes(tiny_model, {"web": small_web})
    truth = retrieve(tiny_model, open_source(str(small_web / "val_retrieval.tar")), "{caption}")
    assert metrics["scenes/t2i_r1"] == truth.metrics["t2i_r1"]
    both = [truth.metrics["t2i_r10"], truth.metrics["i2t_r10"]]
    assert metrics["scenes/r10"] == pytest.approx(np.mean(both))
    found = [unpack_items(each) for each in items["scenes/r10"]]
    np.testing.assert_array_equal(found, [truth.t2i_ranks < 10, truth.i2t_ranks < 10])
    colors = classify(
        tiny_model, open_source(str(small_web / "val_color.tar")), None, captions.COLOR_TEMPLATES
    )
    assert metrics["color/top1"] == colors.metrics["top1"]
    for name, lists in items.items():
        assert metrics[name] == pytest.approx(np.mean([unpack_items(each) for each in lists]))


def test_emoji_are_found_by_their_names(tiny_model, small_web, tmp_path):
    (tmp_path / "emoji_twitter.tar").write_bytes((small_web / "val_retrieval.tar").read_bytes())
    metrics, items = measure_emoji(tiny_model, {"shared": tmp_path})
    assert set(items) == {"emoji/r10"} and metrics["emoji/r10"] > 0
