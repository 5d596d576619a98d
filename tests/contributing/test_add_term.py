"""Worked example of a loss term: it trains with the contrastive loss and matches float64."""

import numpy as np
import pytest

from diht_jax.training.program import TrainProgram
from diht_jax.training.terms.registry import TERMS
from tests.contributing.blocks import load_example
from tests.contributing.tiny_runs import tiny_config, train_two_steps

WEIGHT, START = 3.0, 0.25


@pytest.fixture(autouse=True)
def pair_distance(tmp_path, monkeypatch):
    example = load_example("pair_distance", tmp_path)
    # Registers the example: one file, and one line in the table.
    monkeypatch.setitem(TERMS, "distance", example.PairDistance)


def test_it_trains_on_eight_devices_in_micro_batches():
    config = tiny_config(
        {"distance.weight": WEIGHT, "distance.initial_distance": START, "micro_batch": 8}
    )
    steps = train_two_steps(config)
    for metrics, params, image_emb, text_emb in steps:
        squared = np.sum((image_emb - text_emb) ** 2, axis=1)
        expected = np.mean((squared - np.float64(params["pair_distance"])) ** 2)
        np.testing.assert_allclose(metrics["distance_loss"], expected, rtol=1e-5)
        total = metrics["contrastive_loss"] + WEIGHT * metrics["distance_loss"]
        np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    before, after = (params["pair_distance"] for _, params, *_ in steps)
    assert before == np.float32(START)
    # The mean squared distance is near 2, so the parameter grows. The length of Adam's first step
    # is the learning rate times this term's multiplier (10).
    np.testing.assert_allclose(after - before, 10 * config.optimizer.learning_rate, rtol=1e-2)


def test_without_weight_it_leaves_no_trace():
    state = TrainProgram(tiny_config({}), total_steps=10).abstract_state()
    assert "pair_distance" not in state.params
