"""The contrastive objective on a mesh: its choice of form, global metrics, ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from diht_jax.losses import contrastive_objective
from diht_jax.losses.contrastive import contrastive_loss
from diht_jax.losses.dense import choose_impl


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
    # Rows 0 and 1 tie with each other; the last image has cosine 0 to all texts; the last text is
    # closest to the last image.
    one_device = Mesh(np.asarray(jax.devices()[:1]), ("data",))
    _, metrics = jit_objective(one_device, axis_names="data", impl=impl)(image_emb, text_emb, 10.0)
    np.testing.assert_allclose(metrics["i2t_accuracy"], (1 / 2 + 1 / 2 + 1 / 3) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["t2i_accuracy"], (1 / 2 + 1 / 2 + 1) / 3, rtol=1e-6)


def mesh_of(device_kind, data, fsdp):
    """Returns a mesh of stand-in devices with the attributes that the choice reads."""
    device = type("Device", (), {"device_kind": device_kind})()
    return Mesh(np.full((data, fsdp), device, object), ("data", "fsdp"))


def choose(kind, data, fsdp, num_pairs, width=768):
    return choose_impl(mesh_of(kind, data, fsdp), ("data", "fsdp"), num_pairs, width)


@pytest.mark.parametrize(
    "kind, data, fsdp, num_pairs, impl",
    [
        ("NVIDIA H100", 512, 1, 65_536, "gathered"),  # 23 ms of latency for 0.8 ms of products
        ("NVIDIA H100", 64, 8, 65_536, "streaming"),  # 3 ms, gathered 8.4
        ("NVIDIA H100", 64, 8, 1_048_576, "streaming"),  # 2,048 examples each: products hide it
        ("TPU v5 lite", 32, 8, 8_192, "gathered"),  # 0.17 ms for 0.05 ms, gathered 0.12 ms
        ("cpu", 8, 1, 256, "streaming"),
        ("cpu", 1, 1, 256, "gathered"),
        ("NVIDIA H100", 1, 1, 4_096, "gathered"),
        ("NVIDIA H100", 1, 1, 65_536, "streaming"),  # 52 GB of logits
    ],
)
def test_the_choice(kind, data, fsdp, num_pairs, impl):
    assert choose(kind, data, fsdp, num_pairs).impl == impl


def test_what_does_not_fit_is_not_gathered():
    """Many slow devices: 8,192 transfers of 22 us favour gathering, 18 GB of arrays forbid it."""
    choice = choose("NVIDIA H100", 4096, 1, 1_048_576, width=1024)
    assert choice.impl == "streaming" and "it needs 18.25 GB, of 4.29 GB" in choice.reason
