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


def train_steps(config, batch, num_steps, devices=None):
    """Returns the program, the parameters before and after each step, and the steps' metrics."""
    program = TrainProgram(config, total_steps=10, devices=devices)
    state = program.create_state()
    step = program.step(state)
    params, metrics = [jax.device_get(state.params)], []
    on_mesh = jax.make_array_from_process_local_data(sharding.batch_sharding(program.mesh), batch)
    assert {name: leaf.dtype for name, leaf in on_mesh.items()} == {
        name: leaf.dtype for name, leaf in program.abstract_batch().items()
    }
    for _ in range(num_steps):
        state, found = step(state, on_mesh)
        params.append(jax.device_get(state.params))
        metrics.append(jax.device_get(found))
    assert step._cache_size() == 1
    return program, params, metrics


def train_two_steps(config):
    """Returns for each step its metrics, and the parameters and float64 embeddings before it."""
    batch = draw_batch()
    program, params, metrics = train_steps(config, batch, 2)

    @jax.jit
    def embed(params):
        model = merge_model(program.definition, params)
        images = normalize(batch["images"], jnp.float32)
        return model.encode_image(images), model.encode_text(batch["tokens"])

    return [
        (found, before, *map(np.float64, embed(before)))
        for found, before in zip(metrics, params[:2], strict=True)
    ]
