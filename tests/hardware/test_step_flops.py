"""What the parts of the objective cost in the train step of a real recipe, counted abstractly."""

import pytest

from diht_jax.config import load_recipe
from diht_jax.hardware.flops import count_flops
from diht_jax.training.program import TrainProgram


def recipe(**loss):
    config = load_recipe("configs/diht_vitb16.py")
    config.loss.update(loss)
    return config


def step_work(config):
    """Of one step at the recipe's global batch, on the eight devices of the tests."""
    program = TrainProgram(config, total_steps=10_000)
    state = program.abstract_state()
    return count_flops(program.step(state), state, program.abstract_batch())


def test_hard_negatives_cost_at_most_2_percent_more_work_than_infonce():
    hard, plain = (step_work(recipe(beta=beta)) for beta in (0.25, 0.0))
    assert plain.flops < hard.flops <= 1.02 * plain.flops
    assert hard.matmul_flops == pytest.approx(plain.matmul_flops)
