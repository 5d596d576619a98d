"""The step: clipped scale, donated state, one trace, and its random key."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diht_jax import sharding
from diht_jax.training.program import TrainProgram
from diht_jax.training.state import create_state


def random_batch(mesh, size=16, seed=0):
    rng = np.random.default_rng(seed)
    batch = {
        "images": rng.integers(0, 256, (size, 16, 16, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 49408, (size, 24)).astype(np.int32),
    }
    return sharding.put_batch(batch, sharding.batch_sharding(mesh))


def with_scale(state, scale):
    params = {**state.params, "log_logit_scale": jnp.log(jnp.asarray(scale, jnp.float32))}
    place = state.params["log_logit_scale"].sharding
    params["log_logit_scale"] = jax.device_put(params["log_logit_scale"], place)
    return state.replace(params=params)


def test_step(config):
    """One compiled step serves all checks: compiling is what takes the time."""
    config.mesh.update(data=4, fsdp=2)
    program = TrainProgram(config, config.total_steps)
    mesh, state = program.mesh, program.create_state()
    step = program.step(state)
    batch = random_batch(mesh)
    key_data = np.asarray(state.key_data)
    old_kernel = state.params["text"]["projection"]["kernel"]
    assert old_kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", None)

    # Same state and batch, another step number: another key, so other patches are dropped. The
    # learning rate of step 0 is 0, so parameters stay.
    state, first = step(state, batch)
    assert old_kernel.is_deleted(), "the old state was not donated"
    state, second = step(state, batch)
    assert float(first["loss"]) != float(second["loss"])
    assert float(first["learning_rate"]) == 0.0
    np.testing.assert_array_equal(state.key_data, key_data)
    assert int(state.step) == 2
    assert state.params["text"]["projection"]["kernel"].sharding == old_kernel.sharding

    for scale in (99.9999, 250.0):
        state, metrics = step(with_scale(state, scale), batch)
        assert float(metrics["logit_scale"]) == pytest.approx(scale, rel=1e-5)
        assert np.exp(float(state.params["log_logit_scale"])) <= 100.0 * (1 + 1e-6)
    assert np.exp(float(state.params["log_logit_scale"])) == pytest.approx(100.0, rel=1e-5)
    assert step.trace_count == 1

    step(state, random_batch(mesh, size=8))
    assert step.trace_count == 2, "a batch of another shape must show as a second trace"


@pytest.mark.parametrize("seed", [7, 2**32 - 1])
def test_the_keys_of_a_run_are_those_of_its_seed(seed):
    state = create_state(
        lambda key: {"key": jax.random.key_data(key)},
        optax.identity(),
        sharding.create_mesh(4, 2),
        seed,
    )
    # Threefry's key of a seed, in two words.
    params_key, run_key = jax.random.split(
        jax.random.wrap_key_data(np.array([0, seed], np.uint32), impl="threefry2x32")
    )
    np.testing.assert_array_equal(state.params["key"], jax.random.key_data(params_key))
    np.testing.assert_array_equal(state.key_data, jax.random.key_data(run_key))
    if seed < 2**31:
        np.testing.assert_array_equal(jax.random.key_data(jax.random.key(seed)), [0, seed])
