"""The optimiser against NumPy: AdamW, Muon, schedules, and hand-made tables of update rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from diht_jax import sharding
from diht_jax.config import default_config
from diht_jax.training.optimizer import (
    MUON_COEFFICIENTS,
    MUON_ROUNDS,
    create_optimizer,
    decay_start,
    is_block_matrix,
    learning_rate_schedule,
    merge_parameters,
    update_rules,
)
from tests.compiling import QUICK_COMPILE


def section(**changes):
    config = default_config().optimizer
    config.update(changes)
    return config


def adamw_step(params, grads, moments, step, rate, c, factors):
    """One step of AdamW (arXiv 1711.05101) after a global-norm clip; float64, step from 1.

    `factors` maps each parameter to its factors on the learning rate and the decay.
    """
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    grads = {k: g * min(1.0, c.clip_global_norm / norm) for k, g in grads.items()}
    for k, g in grads.items():
        m, v = moments.get(k, (0.0, 0.0))
        m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g**2
        moments[k] = (m, v)
        update = (m / (1 - c.b1**step)) / (np.sqrt(v / (1 - c.b2**step)) + c.eps)
        decay = c.weight_decay * params[k] if params[k].ndim >= 2 else 0.0
        rate_factor, decay_factor = factors[k]
        params[k] = params[k] - rate * rate_factor * (update + decay_factor * decay)


def test_equals_adamw_with_decay_on_matrices_only_and_rules_for_some():
    """Above and below the clip; frozen parameters, multipliers and layer decay."""
    config = section(
        frozen=("^vision/patch",),
        multipliers=(("projection", 3.0, 0.5), ("^log_logit_scale", 0.0, 1.0)),
        layer_decay=0.5,
    )
    rng = np.random.default_rng(1)
    shapes = {"kernel0": (3, 4), "kernel1": (3, 4), "projection": (4, 2), "scale": ()}
    shapes |= {"bias": (4,), "patches": (2, 2, 3, 4)}
    truth = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    factors = {"kernel0": (0.25, 1.0), "kernel1": (0.5, 1.0)}
    factors |= dict.fromkeys(("projection", "bias"), (3.0, 0.5))
    factors |= {"scale": (0.0, 1.0), "patches": (1.0, 1.0)}

    def arrange(values):
        blocks = {str(i): {"kernel": values[f"kernel{i}"]} for i in range(2)}
        projection = {"kernel": values["projection"], "bias": values["bias"]}
        vision = {"blocks": blocks, "projection": projection}
        head = {"kernel": values["patches"]}
        tree = {"vision": vision, "head": head, "log_logit_scale": values["scale"]}
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)

    patches = {"kernel": jnp.ones((2, 3))}
    optimizer = create_optimizer(config, optax.constant_schedule(0.01))
    trained, frozen = arrange(truth), {"vision": {"patch_embedding": patches}}
    state, moments = optimizer.init(merge_parameters(trained, frozen)), {}
    assert sum(leaf.shape == (2, 3) for leaf in jax.tree.leaves(state)) == 0
    assert sum(leaf.shape == (3, 4) for leaf in jax.tree.leaves(state)) == 4
    for step in range(1, 5):
        size = 0.01 if step % 2 else 3.0
        grads = {name: size * rng.standard_normal(shape) for name, shape in shapes.items()}
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


# Shapes, and factors for a layer decay of 0.5: two image blocks, three text blocks.
PARAMETERS = {
    "log_logit_scale": ((), 1.0),
    "text/blocks/0/mlp/fc_in/bias": ((16,), 0.125),
    "text/blocks/0/mlp/fc_in/kernel": ((4, 16), 0.125),
    "text/blocks/1/mlp/fc_in/kernel": ((4, 16), 0.25),
    "text/blocks/2/mlp/fc_in/kernel": ((4, 16), 0.5),
    "text/final_norm/scale": ((4,), 1.0),
    "text/positional_embedding": ((7, 4), 0.0625),
    "text/projection/kernel": ((4, 5), 1.0),
    "text/token_embedding/embedding": ((9, 4), 0.0625),
    "vision/blocks/0/attention/in_proj/kernel": ((6, 18), 0.25),
    "vision/blocks/1/attention/in_proj/kernel": ((6, 18), 0.5),
    "vision/class_embedding": ((6,), 0.125),
    "vision/patch_embedding/kernel": ((2, 2, 3, 6), 0.125),
    "vision/positional_embedding": ((5, 6), 0.125),
    "vision/post_norm/scale": ((6,), 1.0),
    "vision/pre_norm/scale": ((6,), 0.125),
    "vision/projection/kernel": ((6, 5), 1.0),
}


def table(config):
    leaves = {path: np.zeros(shape, np.float32) for path, (shape, _) in PARAMETERS.items()}
    rules = update_rules(config, unflatten_dict(leaves, sep="/"))
    return {path: (rule.learning_rate, rule.weight_decay) for path, rule in rules.items()}


def test_layer_decay_counts_each_tower_from_its_top():
    expected = {path: factor for path, (_, factor) in PARAMETERS.items()}
    rates = {path: rate for path, (rate, _) in table(section(layer_decay=0.5)).items()}
    assert rates == expected


def test_the_first_multiplier_found_counts_and_layer_decay_comes_on_top():
    config = section(
        layer_decay=0.5,
        multipliers=(("^text/.*embedding", 4.0, 0.0), ("^text/", 0.5, 2.0), ("scale", 3.0, 1.0)),
    )
    found = table(config)
    assert found["text/token_embedding/embedding"] == (0.25, 0.0)
    assert found["text/blocks/2/mlp/fc_in/kernel"] == (0.25, 2.0)
    assert found["text/blocks/0/mlp/fc_in/bias"] == (0.0625, 0.0)
    assert found["text/final_norm/scale"] == (0.5, 0.0)
    assert found["log_logit_scale"] == (3.0, 0.0)
    assert found["vision/projection/kernel"] == (1.0, 1.0)


RATE = 0.01
by_name = functools.partial(flatten_dict, sep="/")


def orthogonal(matrix):
    """Returns Muon's five iterations in float64: a polynomial of the singular values."""
    u, values, v = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    values = values / np.sqrt(np.sum(values**2))
    a, b, c = MUON_COEFFICIENTS
    for _ in range(MUON_ROUNDS):
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
            # Layers of very different scale, so that orthogonalising two together would show.
            kernel = 10.0**layer * rng.standard_normal(shape)
            block[part][module] = {"kernel": jnp.asarray(kernel, jnp.float32)}
            block[part][module]["bias"] = jnp.asarray(rng.standard_normal(shape[1]), jnp.float32)
    projection = {"kernel": jnp.asarray(rng.standard_normal((width, width)), jnp.float32)}
    embedding = {"embedding": jnp.asarray(rng.standard_normal((16, width)), jnp.float32)}
    text = {"blocks": blocks, "projection": projection, "token_embedding": embedding}
    return {"text": text, "log_logit_scale": jnp.float32(rng.standard_normal())}


def expected_update(name, gradient, momentum, rms=0.2):
    """Nesterov's momentum, orthogonalised separately for queries, keys and values."""
    momentum = 0.95 * momentum + gradient
    direction = gradient + 0.95 * momentum
    parts = np.split(direction, 3, axis=1) if "in_proj" in name else [direction]
    scale = rms * np.sqrt(max(parts[0].shape))
    return np.concatenate([scale * orthogonal(part) for part in parts], axis=1), momentum


def test_matrices_of_blocks_get_orthogonal_updates_and_the_rest_adamw():
    """Three layers (two if one is frozen), sharded over four devices."""
    config = section(
        kind="muon",
        clip_global_norm=1e9,
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


def test_wsd_is_constant_between_warm_up_and_decay():
    config = section(schedule="wsd", warmup_steps=10, decay_steps=20, learning_rate=2.0)
    config.final_learning_rate = 0.5
    short, long = (learning_rate_schedule(config, total) for total in (100, 1000))
    assert [float(short(step)) for step in (0, 5, 10, 80)] == [0.0, 1.0, 2.0, 2.0]
    np.testing.assert_allclose(short(85), 2.0 - 1.5 * np.sqrt(5 / 20), rtol=1e-6)
    assert float(short(100)) == 0.5 and decay_start(config, 100) == 80
    steps = np.arange(81)
    np.testing.assert_array_equal(short(steps), long(steps))
