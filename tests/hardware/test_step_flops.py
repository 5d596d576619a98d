"""Matrix-product FLOPs of the concept heads in the train step of a real recipe."""

from diht_jax.config import load_recipe
from diht_jax.hardware.chips import count_flops
from diht_jax.training.program import TrainProgram


def work(concept_weight):
    """Returns the FLOPs of one step at the recipe's global batch, on the tests' eight devices."""
    config = load_recipe("configs/diht_vitb16.py")
    config.model.scan_layers = True  # traces faster
    config.concepts.object_weight = config.concepts.attribute_weight = concept_weight
    program = TrainProgram(config, total_steps=10_000)
    state = program.abstract_state()
    return count_flops(program.step(state), state, program.abstract_batch())


def test_concept_heads_cost_at_most_1_percent():
    without, heads = work(0.0), work(1.0)
    assert without < heads <= 1.01 * without
