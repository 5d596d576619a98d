"""Training steps of a tiny model, and its embeddings as computed on one device."""

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax import sharding
from diht_jax.config import default_config, validate_config
from diht_jax.input.transforms import normalize
from diht_jax.models.parameters import merge_model
from diht_jax.training.program import TrainProgram
from tests import make

BATCH_SIZE = 16


def tiny_config(changes):
    """A validated config for eight devices that trains in seconds."""
    config = make.tiny_config(
        model__overrides__context_length=8,
        model__overrides__vocab_size=64,
        mesh__data=4,
        mesh__fsdp=2,
    )
    config.update_from_flattened_dict(changes)
    validate_config(config, default_config())
    return config


def draw_batch():
    """Draws a batch of random images and tokens."""
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (BATCH_SIZE, 16, 16, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 64, (BATCH_SIZE, 8)).astype(np.int32),
    }


def train_one_step(config, batch, devices=None):
    """Returns the program, the parameters before and after one step, and the step's metrics."""
    program = TrainProgram(config, total_steps=10, devices=devices)
    state = program.create_state()
    step = program.step(state)
    before = jax.device_get(state.params)
    on_mesh = jax.make_array_from_process_local_data(sharding.batch_sharding(program.mesh), batch)
    assert {name: leaf.dtype for name, leaf in on_mesh.items()} == {
        name: leaf.dtype for name, leaf in program.abstract_batch().items()
    }
    state, metrics = step(state, on_mesh)
    return program, before, jax.device_get(state.params), jax.device_get(metrics)


def train_two_steps(config):
    """Returns for each step its metrics, and the parameters and float64 embeddings before it."""
    program = TrainProgram(config, total_steps=10)
    state = program.create_state()
    step = program.step(state)
    batch = draw_batch()
    on_mesh = jax.make_array_from_process_local_data(sharding.batch_sharding(program.mesh), batch)

    @jax.jit
    def embed(params):
        model = merge_model(program.definition, params)
        images = normalize(batch["images"], jnp.float32)
        return model.encode_image(images), model.encode_text(batch["tokens"])

    steps = []
    for _ in range(2):
        params = jax.device_get(state.params)
        embeddings = [np.float64(emb) for emb in embed(params)]
        state, metrics = step(state, on_mesh)
        steps.append((jax.device_get(metrics), params, *embeddings))
    assert step._cache_size() == 1
    return steps
