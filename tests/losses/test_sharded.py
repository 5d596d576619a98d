"""The contrastive objective on a mesh: metrics of the global batch, ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from diht_jax.losses import contrastive_objective
from diht_jax.losses.contrastive import contrastive_loss


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.asarray(jax.devices()).reshape(2, 4), ("data", "fsdp"))


def unit_rows(seed, shape):
    rows = np.random.default_rng(seed).normal(size=shape)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def jit_objective(mesh, **settings):
    return jax.jit(functools.partial(contrastive_objective, mesh=mesh, **settings))


def test_metrics_of_the_global_batch_equal_a_table_made_with_numpy(mesh):
    image_emb, text_emb = unit_rows(3, (32, 8)), unit_rows(4, (32, 8))
    text_emb[::3] = image_emb[::3]
    similarities = np.float64(image_emb) @ np.float64(text_emb).T
    negatives = similarities - 9 * np.eye(32)
    expected = {
        "loss": contrastive_loss(image_emb, text_emb, 10.0, beta=0.25),
        "i2t_accuracy": np.mean(similarities.argmax(1) == np.arange(32)),
        "t2i_accuracy": np.mean(similarities.argmax(0) == np.arange(32)),
        "positive_similarity": np.diagonal(similarities).mean(),
        "hardest_negative_similarity": (negatives.max(0).mean() + negatives.max(1).mean()) / 2,
    }
    assert 0.2 < expected["i2t_accuracy"] < 0.8
    loss, metrics = jit_objective(mesh, beta=0.25)(image_emb, text_emb, 10.0)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)
        assert metrics[name].dtype == jnp.float32 and metrics[name].shape == ()
    np.testing.assert_array_equal(loss, metrics["loss"])


@pytest.mark.parametrize("impl", ["streaming", "gathered"])
def test_ties_count_as_a_fair_draw(impl):
    image_emb = np.float32([[1, 0], [1, 0], [0, 1]])
    text_emb = np.float32([[1, 0], [1, 0], [-1, 0]])
    # Rows 0 and 1 tie with each other; the last image is 0 from all texts; the last text is
    # closest to the last image.
    one_device = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    _, metrics = jit_objective(one_device, axis_names="data", impl=impl)(image_emb, text_emb, 10.0)
    np.testing.assert_allclose(metrics["i2t_accuracy"], (1 / 2 + 1 / 2 + 1 / 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["t2i_accuracy"], (1 / 2 + 1 / 2 + 1) / 3, rtol=1e-6)
