"""The affinity term in a step: its formula in float64, in micro-batches on any mesh."""

import jax
import numpy as np
import pytest

from diht_jax import sharding
from diht_jax.hardware.flops import count_flops
from diht_jax.input.transforms import normalize
from diht_jax.losses import contrastive_loss
from diht_jax.models.parameters import merge_model
from diht_jax.training.objective import active_terms, total_loss
from diht_jax.training.program import TrainProgram
from tests.contributing.tiny_runs import BATCH_SIZE, tiny_config

WIDTHS, TEMPERATURES, WEIGHT = (6, 10), (0.05, 0.1), 2.0
TERM = {
    "affinity.weight": WEIGHT,
    "affinity.widths": WIDTHS,
    "affinity.temperatures": TEMPERATURES,
}


def batch():
    rng = np.random.default_rng(0)
    shape = BATCH_SIZE, sum(WIDTHS)
    found = {
        "images": rng.integers(0, 256, (BATCH_SIZE, 16, 16, 3)).astype(np.uint8),
        "tokens": rng.integers(1, 64, (BATCH_SIZE, 8)).astype(np.int32),
        "teacher_image_emb": rng.integers(-127, 128, shape).astype(np.float16),
        "teacher_text_emb": rng.integers(-127, 128, shape).astype(np.float16),
    }
    found["teacher_image_emb"][5] = found["teacher_text_emb"][5] = 0  # not embedded
    return found


def one_step(config, devices=None):
    program = TrainProgram(config, total_steps=10, devices=devices)
    state = program.create_state()
    step = program.step(state)
    before = jax.device_get(state.params)
    on_mesh = sharding.put_batch(batch(), sharding.batch_sharding(program.mesh))
    assert {name: leaf.dtype for name, leaf in on_mesh.items()} == {
        name: leaf.dtype for name, leaf in program.abstract_batch().items()
    }
    state, metrics = step(state, on_mesh)
    return program, before, jax.device_get(state.params), jax.device_get(metrics)


def expected_loss(image_emb, text_emb, scale):
    counts = np.arange(BATCH_SIZE) != 5
    total, start = 0, 0
    for width, temperature in zip(WIDTHS, TEMPERATURES, strict=True):
        images, texts = (
            batch()[f"teacher_{kind}_emb"][counts, start : start + width].astype(np.float64)
            for kind in ("image", "text")
        )
        start += width
        images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
        p = np.exp(images @ texts.T / temperature)
        q = np.exp(scale * image_emb[counts] @ text_emb[counts].T)
        for axis in (0, 1):
            p_row, q_row = p / p.sum(axis, keepdims=True), q / q.sum(axis, keepdims=True)
            total += np.sum(p_row * np.log(p_row / q_row)) / counts.sum()
    return total / (2 * len(WIDTHS))


def test_a_step_is_the_formula_whatever_the_mesh():
    program, params, after, metrics = one_step(tiny_config({**TERM, "micro_batch": 8}))

    @jax.jit
    def embed(params):
        model = merge_model(program.definition, params)
        images = normalize(batch()["images"], np.float32)
        return model.encode_image(images), model.encode_text(batch()["tokens"])

    expected = expected_loss(*map(np.float64, embed(params)), np.exp(params["log_logit_scale"]))
    np.testing.assert_allclose(metrics["affinity_loss"], expected, rtol=1e-5)
    total = metrics["contrastive_loss"] + WEIGHT * metrics["affinity_loss"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-6)
    on_one = tiny_config({**TERM, "mesh.data": 1, "mesh.fsdp": 1})
    _, _, after_one, metrics_one = one_step(on_one, jax.devices()[:1])
    for name in ("affinity_loss", "grad_norm"):
        np.testing.assert_allclose(metrics_one[name], metrics[name], rtol=1e-5)
    # Adam's first step is as long as the learning rate whatever the gradient, so compare steps.
    rate = program.config.optimizer.learning_rate
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=0.02 * rate, rtol=0), after, after_one
    )


def test_the_contrastive_loss_has_a_weight():
    """MobileCLIP's sum, (1 - lambda) and lambda: lambda = 1 spares the other's backward pass."""
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(2, BATCH_SIZE, 16))
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    encoded = dict(zip(("image_emb", "text_emb"), np.float32(rows), strict=True))
    scale, mesh = 5.0, sharding.create_mesh(1, 1, jax.devices()[:1])
    logits = scale * rows[0] @ rows[1].T
    contrastive = np.mean([np.log(np.exp(s).sum(1)) - np.diagonal(s) for s in (logits, logits.T)])
    affinity = expected_loss(*rows, scale)
    slopes = jax.grad(lambda e: contrastive_loss(*e.values(), scale, impl="gathered"))(encoded)

    def loss_function(weight):
        config = tiny_config({**TERM, "loss.weight": weight})
        params = {"log_logit_scale": np.float32(np.log(scale))}
        settings = {"terms": active_terms(config), "mesh": mesh, "config": config}
        return lambda encoded: total_loss(encoded, params, batch(), **settings)

    def measure(weight):
        step = jax.value_and_grad(loss_function(weight), has_aux=True)
        (loss, metrics), grads = jax.jit(step)(encoded)
        expected = weight * contrastive + WEIGHT * affinity
        np.testing.assert_allclose([loss, metrics["loss"]], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["contrastive_loss"], contrastive, rtol=1e-5)
        return grads, count_flops(step, encoded).matmul_flops

    (without, few), (with_both, many) = measure(0.0), measure(0.25)
    products = 2 * BATCH_SIZE**2 * 16
    assert many - few == 3 * products  # logits once more, and the gradients of both sides
    for name, slope in slopes.items():
        difference = with_both[name] - without[name]
        np.testing.assert_allclose(difference, 0.25 * slope, atol=1e-6)
        assert np.abs(slope).max() > 1e-3
    plain, weighted = (
        str(jax.make_jaxpr(loss_function(weight))(encoded)).count(" mul ") for weight in (1.0, 0.25)
    )
    assert weighted == plain + 1


def test_its_keys_are_checked():
    for changes, message in (
        ({"affinity.weight": -1.0}, "config.affinity.weight=-1.0: expected at least 0"),
        ({"affinity.weight": 1.0}, "config.affinity.widths is not set: expected those of"),
        ({**TERM, "affinity.temperatures": ()}, "config.affinity.temperatures is not set: expe"),
        ({**TERM, "affinity.temperatures": (0.1,) * 3}, "one for each of the 2 teachers"),
        ({"loss.weight": 0.0}, "config.loss.weight=0: nothing is left to learn from; expected"),
        ({"affinity.temperatures": (0.0,)}, "expected positive numbers, such as"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainProgram(tiny_config(changes), total_steps=10)
