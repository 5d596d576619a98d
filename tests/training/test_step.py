"""The train step: clipped scale, donated state, a single trace, random keys; parameter averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import diht_jax
from diht_jax import sharding
from diht_jax.evaluation.tasks import evaluate_task, parse_tasks
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import read_metrics
from diht_jax.training.program import TrainProgram
from diht_jax.training.step import initial_average, update_average
from tests.training.conftest import assert_bitwise_equal


def with_scale(state, scale):
    params = {**state.params, "log_logit_scale": jnp.log(jnp.asarray(scale, jnp.float32))}
    place = state.params["log_logit_scale"].sharding
    params["log_logit_scale"] = jax.device_put(params["log_logit_scale"], place)
    return state.replace(params=params)


def test_step(config):
    """One compiled step serves all checks, since compiling takes most of the time."""
    config.mesh.update(data=1, fsdp=2)
    program = TrainProgram(config, config.total_steps, jax.devices()[:2])
    mesh, state = program.mesh, program.create_state()
    step = program.step(state)
    rng = np.random.default_rng(0)
    batch = {
        "images": rng.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 700, (16, 24)).astype(np.int32),
    }
    batch = jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), batch)
    key_data = np.asarray(state.key_data)
    old_kernel = state.params["text"]["projection"]["kernel"]
    assert old_kernel.sharding.spec == jax.sharding.PartitionSpec("fsdp", None)

    # With the same state and batch, another step number gives another key, so other patches are
    # dropped. The learning rate of step 0 is 0, so parameters stay.
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
    assert step._cache_size() == 1


def test_the_keys_of_a_run_are_those_of_its_seed(config):
    config.seed = 2**32 - 1  # larger than `jax.random.key` accepts
    program = TrainProgram(config, total_steps=10)
    program.init_params = lambda key: {"key": jax.random.key_data(key)}
    program.optimizer = optax.identity()
    state = program.create_state()
    # Threefry's key of a seed, as two words.
    params_key, run_key = jax.random.split(
        jax.random.wrap_key_data(np.array([0, config.seed], np.uint32), impl="threefry2x32")
    )
    np.testing.assert_array_equal(state.params["key"], jax.random.key_data(params_key))
    np.testing.assert_array_equal(state.key_data, jax.random.key_data(run_key))


def test_average_follows_its_recurrence():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((60, 5)).astype(np.float32)
    average = initial_average({"w": jnp.asarray(values[0])})
    expected = values[0].astype(np.float64)
    for step, value in enumerate(values[1:]):
        average = update_average(average, {"w": jnp.asarray(value)}, 0.8, jnp.int32(step))
        decay = min(0.8, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        np.testing.assert_allclose(average["w"], expected, rtol=1e-5, atol=1e-6)


def test_a_run_with_a_locked_image_tower_evaluates_and_saves_its_average(config, squares, tmp_path):
    config.total_steps = 4
    config.ema.decay = 0.5
    config.optimizer.warmup_steps = 0
    config.optimizer.frozen = ("^vision/",)
    config.mesh.update(data=1, fsdp=2)
    config.evaluation.tasks = f"retrieval:{squares}?caption_template={{caption}}"
    config.evaluation.use_ema = True
    state = train(config, tmp_path, devices=jax.devices()[:2])

    kernel = state.params["text"]["projection"]["kernel"]
    average = state.ema_params["text"]["projection"]["kernel"]
    assert average.sharding == kernel.sharding
    assert np.abs(np.asarray(average - kernel)).max() > 1e-5
    assert_bitwise_equal(state.ema_params["vision"], state.params["vision"])
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    trained = 1 + sum(leaf.size for leaf in jax.tree.leaves(state.params["text"]))
    assert 2 * trained <= moments <= 2 * trained + 2

    averaged, live = (diht_jax.load_model(tmp_path, ema=ema) for ema in (True, False))
    assert_bitwise_equal(averaged._params, state.ema_params)
    assert_bitwise_equal(live._params, state.params)
    (task,) = parse_tasks([config.evaluation.tasks])
    logged = {k: v for k, v in read_metrics(tmp_path)[-1].items() if k.startswith("evaluation/")}
    results = {}
    for model in (averaged, live):
        metrics = evaluate_task(model, task, batch_size=512)["metrics"]
        results[model] = {f"evaluation/{task.name}/{k}": v for k, v in metrics.items()}
    assert logged == pytest.approx(results[averaged])
    assert logged != pytest.approx(results[live])
