"""What the parts of the objective cost in the train step of a real recipe, in matrix products."""

import functools

import pytest

from diht_jax.config import load_recipe
from diht_jax.hardware.chips import count_flops
from diht_jax.training.program import TrainProgram


@functools.cache
def step_work(beta=0.25, concept_weight=1.0):
    """Of one step at the recipe's global batch, on the eight devices of the tests."""
    config = load_recipe("configs/diht_vitb16.py")
    config.model.scan_layers = True  # is traced sooner
    config.loss.beta = beta
    config.concepts.object_weight = config.concepts.attribute_weight = concept_weight
    program = TrainProgram(config, total_steps=10_000)
    state = program.abstract_state()
    return count_flops(program.step(state), state, program.abstract_batch())


def test_hard_negatives_need_the_products_of_infonce():
    assert step_work() == pytest.approx(step_work(beta=0.0))


def test_concept_heads_cost_at_most_1_percent():
    without, heads = step_work(concept_weight=0.0), step_work()
    assert without < heads <= 1.01 * without
