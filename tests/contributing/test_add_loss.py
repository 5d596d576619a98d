"""The worked example of a contrastive loss trains, in both forms, as its formula in float64."""

import numpy as np
import pytest

from diht_jax.losses.registry import LOSSES
from tests.contributing.blocks import load_example
from tests.contributing.tiny_runs import BATCH_SIZE, tiny_config, train_two_steps

TARGET = 4.0


@pytest.fixture(autouse=True)
def squared_error(tmp_path, monkeypatch):
    example = load_example("squared_error", tmp_path)
    # One file, and one line in the table.
    monkeypatch.setitem(LOSSES, "squared_error", example.SquaredError)


def by_hand(image_emb, text_emb, scale):
    """The mean over both directions; each of them is the same sum."""
    return np.sum((scale * image_emb @ text_emb.T - TARGET * np.eye(BATCH_SIZE)) ** 2) / BATCH_SIZE


def test_it_trains_on_eight_devices_in_both_forms():
    runs = {}
    for impl in ("streaming", "gathered"):
        config = tiny_config(
            {"loss.kind": "squared_error", "loss.impl": impl, "loss.target": TARGET}
        )
        runs[impl] = train_two_steps(config)
        for metrics, params, image_emb, text_emb in runs[impl]:
            expected = by_hand(image_emb, text_emb, np.exp(np.float64(params["log_logit_scale"])))
            np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
        losses = [metrics["loss"] for metrics, *_ in runs[impl]]
        assert losses[1] < losses[0]
    for (streaming, *_), (dense, *_) in zip(*runs.values(), strict=True):
        # The slopes by hand of one form are JAX's own of the other.
        np.testing.assert_allclose(streaming["grad_norm"], dense["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(streaming["loss"], dense["loss"], rtol=1e-5)
