"""The moving average of the parameters: its values, its files, and what is evaluated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diht_jax
from diht_jax.evaluation.tasks import evaluate_task, parse_tasks
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import flatten_results, read_metrics
from diht_jax.training.state import initial_average, update_average


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
    config.mesh.update(data=4, fsdp=2)
    config.evaluation.tasks = f"retrieval:{squares}?caption_template={{caption}}"
    config.evaluation.use_ema = True
    state = train(config, tmp_path)

    kernel = state.params["text"]["projection"]["kernel"]
    average = state.ema_params["text"]["projection"]["kernel"]
    assert average.sharding == kernel.sharding
    assert np.abs(np.asarray(average - kernel)).max() > 1e-5
    assert_equal(state.ema_params["vision"], state.params["vision"])
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    sizes = {name: total_size(tree) for name, tree in state.params.items()}
    assert 2 * (sizes["text"] + 1) <= moments <= 2 * (sizes["text"] + 1) + 2

    averaged, live = (diht_jax.load_model(tmp_path, ema=ema) for ema in (True, False))
    assert_equal(averaged._params, state.ema_params)
    assert_equal(live._params, state.params)
    (task,) = parse_tasks([config.evaluation.tasks])
    logged = {k: v for k, v in read_metrics(tmp_path)[-1].items() if k.startswith("evaluation/")}
    results = {}
    for model in (averaged, live):
        metrics = evaluate_task(model, task, batch_size=512)["metrics"]
        results[model] = {
            f"evaluation/{k}": v for k, v in flatten_results({task.name: metrics}).items()
        }
    assert logged == pytest.approx(results[averaged])
    assert logged != pytest.approx(results[live])


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def total_size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
