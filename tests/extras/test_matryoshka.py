"""Losses over several embedding sizes, against the float64 sum of their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diht_jax.extras.matryoshka import first_numbers, loss_of_sizes
from diht_jax.losses import contrastive_objective
from tests.losses import formulas

SIZES = {3: 0.5, 8: 2.0, 16: 1.0}
NUM_PAIRS = 48


def pairs():
    rng = np.random.default_rng(0)
    image_emb = rng.normal(size=(NUM_PAIRS, 16))
    text_emb = image_emb + 0.3 * rng.normal(size=(NUM_PAIRS, 16))
    return [emb / np.linalg.norm(emb, axis=1, keepdims=True) for emb in (image_emb, text_emb)]


def infonce_of_sizes(image_emb, text_emb, scale):
    total = 0
    for size, weight in SIZES.items():
        x, t = image_emb[..., :size], text_emb[..., :size]
        if size < 16:  # the full embeddings are used as given
            x, t = (emb / np.sqrt(np.sum(emb**2, axis=-1, keepdims=True)) for emb in (x, t))
        total += weight * formulas.defining_loss(x, t, scale, alpha=1.0, beta=0.0)
    return total


def test_the_sum_and_its_gradients_are_the_formula():
    image_emb, text_emb = pairs()
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))

    def loss(image_emb, text_emb):
        one_size = functools.partial(contrastive_objective, logit_scale=20.0, mesh=mesh)
        return loss_of_sizes(one_size, image_emb, text_emb, SIZES)

    with jax.enable_x64(True):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, metrics), (by_images, _) = step(jnp.asarray(image_emb), jnp.asarray(text_emb))
    assert metrics["loss"] == value and {"loss_3", "loss_8", "loss_16"} < metrics.keys()
    formula = functools.partial(infonce_of_sizes, text_emb=text_emb, scale=20.0)
    expected, (slopes,) = formulas.complex_step(formula, image_emb)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(by_images, slopes, rtol=0, atol=1e-12)


def test_an_embedding_that_begins_with_zeros_has_a_finite_gradient():
    emb = jnp.zeros((1, 4)).at[0, 3].set(1.0)
    assert np.isfinite(jax.grad(lambda emb: first_numbers(emb, 2).sum())(emb)).all()
