"""Worst groups and macro F1, against scikit-learn and sums by hand."""

import numpy as np
import pytest

from diht_jax.evaluation.protocols.class_metrics import (
    Groups,
    describe_groups,
    f1_macro,
    metrics_of_groups,
    read_group,
)
from diht_jax.records.schema import Pair


def test_f1_is_that_of_scikit_learn_over_the_classes_with_images():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    # Of nine classes 7 and 8 have no image but are predicted, as in iWildCam's test split.
    labels, predictions = rng.integers(0, 7, 300), rng.integers(0, 9, 300)
    predictions[::3] = labels[::3]
    for counts in (np.ones(300, int), rng.integers(0, 3, 300) * (labels != 2)):
        there = np.repeat(np.arange(300), counts)
        expected = metrics.f1_score(
            labels[there], predictions[there], average="macro", labels=np.unique(labels[there])
        )
        assert f1_macro(predictions, labels, counts) == pytest.approx(expected)


def test_the_worst_group_is_the_one_of_the_fewest_right():
    # Region 3 has one image, so that a resample may have none of it.
    groups = Groups.of([1, 1, 0, 1, 0, 3])
    ranks = np.array([0, 1, 0, 7, 4, 5])
    assert groups.names == (0, 1, 3)
    everything = np.ones(6, int)
    assert metrics_of_groups(ranks, groups, 10, everything) == {
        "worst_group": 0.0,
        "worst_group_top5": 0.0,
    }
    without_the_last = np.array([1, 1, 1, 1, 1, 0])
    found = metrics_of_groups(ranks, groups, 10, without_the_last)
    assert found == pytest.approx({"worst_group": 1 / 3, "worst_group_top5": 2 / 3})
    assert "worst_group_top5" not in metrics_of_groups(ranks, groups, 5, everything)
    assert describe_groups(ranks, groups)[1] == {
        "group": 1,
        "images": 3,
        "top1": pytest.approx(1 / 3),
        "top5": pytest.approx(2 / 3),
    }


def test_groups_of_a_picture():
    pair = Pair("k", b"", "", {"numbers": [2.0, 1.5], "region": "Asia", "year": 2016})
    assert read_group(pair, "0") == 2
    assert (read_group(pair, "region"), read_group(pair, "year")) == ("Asia", 2016)
    with pytest.raises(ValueError, match="record 'k' has no group '2'; it has 2 numbers in its"):
        read_group(pair, "2")
    with pytest.raises(ValueError, match="expected group '1' to be a text or a whole number"):
        read_group(pair, "1")
    with pytest.raises(ValueError, match="no group 'country'; it has .'numbers', 'region', 'year'"):
        read_group(pair, "country")
