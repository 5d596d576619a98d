"""What the parts of the objective cost in the train step of a real recipe, in matrix products."""

import functools

import pytest

from diht_jax.config import load_recipe
from diht_jax.hardware.chips import count_flops
from diht_jax.training.program import TrainProgram


@functools.cache
def work(beta=0.25, concept_weight=1.0):
    """Of one step at the recipe's global batch, on the eight devices of the tests."""
    program = program_of(beta, concept_weight)
    state = state_of(concept_weight)
    return count_flops(program.step(state), state, program.abstract_batch())


@functools.cache
def state_of(concept_weight):
    return program_of(0.25, concept_weight).abstract_state()


def program_of(beta, concept_weight):
    config = load_recipe("configs/diht_vitb16.py")
    config.model.scan_layers = True  # is traced sooner
    config.loss.beta = beta
    config.concepts.object_weight = config.concepts.attribute_weight = concept_weight
    return TrainProgram(config, total_steps=10_000)


def test_hard_negatives_need_the_products_of_infonce():
    assert work() == pytest.approx(work(beta=0.0))


def test_concept_heads_cost_at_most_1_percent():
    without, heads = work(concept_weight=0.0), work()
    assert without < heads <= 1.01 * without
