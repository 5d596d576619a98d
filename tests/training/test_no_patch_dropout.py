"""The last part of a run with patch dropout, trained on whole images."""

import jax
import pytest

from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics


def test_a_run_ends_on_whole_images_and_is_resumed_on_them(config, tmp_path):
    config.total_steps = 5
    config.no_patch_dropout_steps = 2
    config.model.overrides.vision_layers = 2
    config.model.patch_dropout = 0.5
    config.optimizer.warmup_steps = 1
    config.log_every_steps = 100
    config.mesh.update(data=1, fsdp=1)
    devices = jax.devices()[:1]
    train(config, tmp_path, stop_after_steps=4, devices=devices)
    assert int(train(config, tmp_path, devices=devices).step) == 5
    # A line is written where the parts meet, so that none averages over both.
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [3, 4, 5]
    costs = [row["model_flops_per_sec"] / row["images_per_sec"] for row in rows]
    assert costs[1] == pytest.approx(costs[2])
    # Of 16 patches, 8 are left; the text tower costs what it did.
    assert 1.2 < costs[1] / costs[0] < 2.0
