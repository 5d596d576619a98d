"""Muon against singular values in float64, AdamW for the rest, and the schedule with a decay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diht_jax import sharding
from diht_jax.config import default_config
from diht_jax.training.muon import COEFFICIENTS, ROUNDS, is_block_matrix, orthogonalize
from diht_jax.training.optimizer import create_optimizer, decay_start, learning_rate_schedule

RATE = 0.01
QUICK_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def orthogonal(matrix):
    """What five rounds make of a matrix: of its singular values, a polynomial; float64."""
    u, values, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    values = values / np.sqrt(np.sum(values**2))
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        values = a * values + b * values**3 + c * values**5
    return u @ np.diag(values) @ v


def draw_blocks(seed, width=8, layers=3):
    rng = np.random.default_rng(seed)
    kernels = {
        "attention/in_proj": (width, 3 * width),
        "attention/out_proj": (width, width),
        "mlp/fc_in": (width, 4 * width),
        "mlp/fc_out": (4 * width, width),
    }
    blocks = {}
    for layer in range(layers):
        block = blocks[str(layer)] = {"attention": {}, "mlp": {}}
        for name, shape in kernels.items():
            part, module = name.split("/")
            # Layers of very different size: one orthogonalised with another would show.
            kernel = 10.0**layer * rng.standard_normal(shape)
            block[part][module] = {"kernel": jnp.asarray(kernel, jnp.float32)}
            block[part][module]["bias"] = jnp.asarray(rng.standard_normal(shape[1]), jnp.float32)
    projection = {"kernel": jnp.asarray(rng.standard_normal((width, width)), jnp.float32)}
    embedding = {"embedding": jnp.asarray(rng.standard_normal((16, width)), jnp.float32)}
    text = {"blocks": blocks, "projection": projection, "token_embedding": embedding}
    return {"text": text, "log_logit_scale": jnp.float32(rng.standard_normal())}


def section(**changes):
    config = default_config().optimizer
    config.update(kind="muon", clip_global_norm=1e9, **changes)
    return config


def expected_update(name, gradient, momentum, rms=0.2):
    """Nesterov's momentum, orthogonalised: queries, keys and values each for themselves."""
    momentum = 0.95 * momentum + gradient
    direction = gradient + 0.95 * momentum
    parts = np.split(direction, 3, axis=1) if "in_proj" in name else [direction]
    scale = rms * np.sqrt(max(parts[0].shape))
    return np.concatenate([scale * orthogonal(part) for part in parts], axis=1), momentum


def test_matrices_of_blocks_get_orthogonal_updates_and_the_rest_adamw():
    """Of three layers (two, where one is frozen), and four devices that share them."""
    config = section(
        multipliers=(("mlp/fc_in", 3.0, 0.5), ("^log_logit_scale", 0.0, 1.0)),
        frozen=("^text/blocks/1/mlp/fc_out",),
    )
    mesh = sharding.create_mesh(2, 4)
    adamw = config.copy_and_resolve_references()
    adamw.kind = "adamw"
    schedule = optax.constant_schedule(RATE)
    optimizer, reference = (
        create_optimizer(config, schedule, mesh),
        create_optimizer(adamw, schedule),
    )
    params, gradients = draw_blocks(0), [draw_blocks(seed) for seed in (1, 2)]
    for tree in gradients:
        del tree["text"]["blocks"]["1"]["mlp"]["fc_out"]

    @functools.partial(jax.jit, compiler_options=QUICK_COMPILE)
    def two_updates(params, gradients):
        states = [optimizer.init(params), reference.init(params)]
        found = []
        for tree in gradients:
            pair = []
            for i, one in enumerate((optimizer, reference)):
                updates, states[i] = one.update(tree, states[i], params)
                pair.append(updates)
            found.append(pair)
        return found

    placed = [jax.device_put(t, sharding.tree_shardings(t, mesh)) for t in (params, *gradients)]
    momenta, flat = {}, by_name(params)
    for tree, (updates, others) in zip(gradients, two_updates(placed[0], placed[1:]), strict=True):
        tree, others = by_name(tree), by_name(others)
        for name, update in by_name(updates).items():
            if not is_block_matrix(name):
                np.testing.assert_allclose(update, others[name], rtol=1e-5, atol=1e-9)
                continue
            gradient = np.asarray(tree[name], np.float64)
            expected, momenta[name] = expected_update(name, gradient, momenta.get(name, 0.0))
            factor, decay = (3.0, 0.05) if "fc_in" in name else (1.0, 0.1)
            expected = -RATE * factor * (expected + decay * np.asarray(flat[name]))
            np.testing.assert_allclose(update, expected, rtol=2e-4, atol=2e-5, err_msg=name)
    assert len(momenta) == 11


def by_name(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}


def test_the_first_update_is_that_of_optax():
    """Leaf by leaf; later ones differ, since optax corrects the bias of the momentum."""
    rng = np.random.default_rng(3)
    matrices = jnp.asarray(rng.standard_normal((2, 6, 10)), jnp.float32)
    muon = optax.contrib.scale_by_muon(
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
    )
    expected, _ = muon.update(matrices, muon.init(matrices))
    np.testing.assert_allclose(orthogonalize(matrices), expected, rtol=1e-4, atol=1e-6)
    assert not np.any(orthogonalize(jnp.zeros((2, 3))))


def test_wsd_is_constant_between_warm_up_and_decay():
    config = section(schedule="wsd", warmup_steps=10, decay_steps=20, learning_rate=2.0)
    config.final_learning_rate = 0.5
    short, long = (learning_rate_schedule(config, total) for total in (100, 1000))
    assert [float(short(step)) for step in (0, 5, 10, 80)] == [0.0, 1.0, 2.0, 2.0]
    np.testing.assert_allclose(short(85), 2.0 - 1.5 * np.sqrt(5 / 20), rtol=1e-6)
    assert float(short(100)) == 0.5 and decay_start(config, 100) == 80
    steps = np.arange(81)
    np.testing.assert_array_equal(short(steps), long(steps))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"schedule": "linear"}, "schedule='linear': expected one of cosine, wsd"),
        ({"decay_steps": 5}, "decay_steps=5 is of config.optimizer.schedule='wsd'"),
        ({"schedule": "wsd"}, "decay_steps=None: expected at most 90"),
        ({"schedule": "wsd", "decay_steps": 91}, "decay_steps=91: expected at most 90"),
    ],
)
def test_schedules_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_schedule(section(warmup_steps=10, **changes), 100)


def test_no_such_optimizer():
    with pytest.raises(ValueError, match="kind='lion': expected one of adamw, muon"):
        config = section()
        config.kind = "lion"
        create_optimizer(config, optax.constant_schedule(RATE))
