"""`benchmarks/train_step.py`: whole training steps in JAX match those in torch."""

import numpy as np
import pytest

from benchmarks import train_step
from diht_jax.models import get_architecture
from tests import make


def test_losses_follow_those_of_open_clip(monkeypatch):
    monkeypatch.setattr(train_step, "LEARNING_RATE", 2e-3)
    config = train_step.diht_config("tiny_32px", "cpu", 16)
    config.model.overrides.update(make.tiny_config().model.overrides.to_dict())
    config.model.overrides.update(vision_layers=2, text_layers=2)
    config.optimizer.learning_rate = 2e-3
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    sides = train_step.build_sides(arch, config, "cpu", torch_compile=False)
    assert train_step.warm_up(sides) == {}
    train_step.check_same_training(sides, 1e-4)
    secs = train_step.time_rounds(sides, rounds=3, steps=2)
    assert {name: len(values) for name, values in secs.items()} == dict.fromkeys(sides, 3)
    ours, theirs = sides["diht_jax"].losses, sides["open_clip"].losses
    assert len(ours) == 5 and ours[-1] < 0.9 * ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)

    sides["open_clip"].losses[1] += 0.01
    with pytest.raises(AssertionError, match="train differently"):
        train_step.check_same_training(sides, 1e-4)
