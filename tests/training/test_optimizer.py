"""The optimiser against a NumPy transcription of clipped AdamW, and its schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diht_jax.config import default_config
from diht_jax.training.optimizer import create_optimizer, learning_rate_schedule, merge_parameters


def section(**changes):
    config = default_config().optimizer
    config.update(changes)
    return config


def adamw_step(params, grads, moments, step, rate, c, factors=None):
    """One step of AdamW (arXiv 1711.05101) after a global-norm clip; float64, step from 1.

    `factors` gives some parameters factors on the learning rate and on the decay.
    """
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    grads = {k: g * min(1.0, c.clip_global_norm / norm) for k, g in grads.items()}
    for k, g in grads.items():
        m, v = moments.get(k, (0.0, 0.0))
        m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g**2
        moments[k] = (m, v)
        update = (m / (1 - c.b1**step)) / (np.sqrt(v / (1 - c.b2**step)) + c.eps)
        decay = c.weight_decay * params[k] if params[k].ndim >= 2 else 0.0
        rate_factor, decay_factor = (factors or {}).get(k, (1.0, 1.0))
        params[k] = params[k] - rate * rate_factor * (update + decay_factor * decay)


def test_equals_adamw_with_decay_on_matrices_only():
    config = section(warmup_steps=0, learning_rate=0.01)
    rng = np.random.default_rng(0)
    shapes = {"matrix": (3, 4), "kernel": (2, 2, 3, 4), "bias": (4,), "scale": ()}
    truth = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), truth)
    schedule = optax.constant_schedule(config.learning_rate)
    optimizer = create_optimizer(config, schedule)
    state, moments = optimizer.init(params), {}
    for step in range(1, 6):
        size = 0.01 if step % 2 else 3.0  # below and above the clip
        grads = {name: size * rng.standard_normal(shape) for name, shape in shapes.items()}
        adamw_step(truth, grads, moments, step, config.learning_rate, config)
        updates, state = optimizer.update(
            jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), grads), state, params
        )
        params = optax.apply_updates(params, updates)
    for name, expected in truth.items():
        np.testing.assert_allclose(params[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_frozen_parameters_multipliers_and_layer_decay():
    config = section(
        frozen=("^vision/patch",),
        multipliers=(("projection", 3.0, 0.5), ("^log_logit_scale", 0.0, 1.0)),
        layer_decay=0.5,
    )
    rng = np.random.default_rng(1)
    shapes = {"kernel0": (3, 4), "kernel1": (3, 4), "projection": (4, 2), "scale": ()}
    truth = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    factors = {"kernel0": (0.25, 1.0), "kernel1": (0.5, 1.0), "projection": (3.0, 0.5)}
    factors["scale"] = (0.0, 1.0)

    def arrange(values):
        blocks = {str(i): {"kernel": values[f"kernel{i}"]} for i in range(2)}
        vision = {"blocks": blocks, "projection": {"kernel": values["projection"]}}
        tree = {"vision": vision, "log_logit_scale": values["scale"]}
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    patches = {"kernel": jnp.ones((2, 3))}
    optimizer = create_optimizer(config, optax.constant_schedule(0.01))
    trained, frozen = arrange(truth), {"vision": {"patch_embedding": patches}}
    state, moments = optimizer.init(merge_parameters(trained, frozen)), {}
    assert sum(leaf.shape == (2, 3) for leaf in jax.tree.leaves(state)) == 0
    assert sum(leaf.shape == (3, 4) for leaf in jax.tree.leaves(state)) == 4
    for step in range(1, 4):
        grads = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        adamw_step(truth, grads, moments, step, 0.01, config, factors)
        updates, state = optimizer.update(arrange(grads), state, merge_parameters(trained, frozen))
        trained = optax.apply_updates(trained, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        trained,
        arrange(truth),
    )


def test_schedule_warms_up_and_follows_half_a_cosine():
    config = section(warmup_steps=10, learning_rate=2.0, final_learning_rate=0.5)
    schedule = learning_rate_schedule(config, 110)
    assert float(schedule(0)) == 0.0
    np.testing.assert_allclose(schedule(5), 1.0, rtol=1e-6)
    for step in (10, 30, 60, 110):
        share = (step - 10) / 100
        expected = 0.5 + (2.0 - 0.5) * 0.5 * (1 + np.cos(np.pi * share))
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-6)
