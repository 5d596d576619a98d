"""Worked example of a contrastive loss: both forms train and match a float64 formula."""

import numpy as np
import pytest

from diht_jax.losses.registry import LOSSES
from tests.contributing.blocks import load_example
from tests.contributing.tiny_runs import BATCH_SIZE, tiny_config, train_two_steps

TARGET = 4.0


@pytest.fixture(autouse=True)
def squared_error(tmp_path, monkeypatch):
    example = load_example("squared_error", tmp_path)
    # Registers the example: one file, and one line in the table.
    monkeypatch.setitem(LOSSES, "squared_error", example.SquaredError)


def by_hand(image_emb, text_emb, scale):
    """The loss in float64; the mean over both directions, which have equal sums."""
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
        # The hand-written gradients of the streaming form equal JAX's gradients of the dense one.
        np.testing.assert_allclose(streaming["grad_norm"], dense["grad_norm"], rtol=1e-5)
        np.testing.assert_allclose(streaming["loss"], dense["loss"], rtol=1e-5)
