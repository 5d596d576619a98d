"""The streaming loss against the dense reference: tiles, dtypes, meshes, memory, work."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diht_jax.hardware.chips import count_flops
from diht_jax.losses import contrastive_objective, sigmoid_loss
from diht_jax.losses.dense import dense_loss
from diht_jax.losses.sigmoid import Sigmoid
from diht_jax.losses.softmax import Softmax
from diht_jax.losses.streaming import streaming_loss

ALPHAS, BETAS = (1.0, 0.999, 0.5), (0.0, 0.25, 1.0)
MESHES = {"1": (1, 1), "2": (2, 1), "8": (8, 1), "2x4": (2, 4), "1x8": (1, 8)}
DTYPES = ("float64", "float32", "bfloat16")


def pairs(num_pairs, width=16, dtype=np.float32):
    """Noisy pairs, every eighth text a copy of a wrong one: losses large and small, no ties."""
    rng = np.random.default_rng(0)
    image_emb = rng.normal(size=(num_pairs, width))
    text_emb = image_emb + 0.1 * rng.normal(size=(num_pairs, width))
    text_emb[::8] = np.roll(text_emb, 3, axis=0)[::8]
    return tuple(
        jnp.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype)
        for rows in (image_emb, text_emb)
    )


def assert_same(found, expected, rtol, num_compared=4):
    """Values and the first gradients of two results, relative to the largest entry."""
    names = ("value", "image", "text", "scale", "parameters")[: 1 + num_compared]
    both = ((value, *grads) for value, grads in (found, expected))
    for name, one, other in zip(names, *both, strict=False):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.max(np.abs(b)), err_msg=name)


@pytest.mark.parametrize(
    "mesh, dtype",
    [
        *itertools.product(("1", "2x4"), DTYPES),
        ("2", "float64"),
        ("8", "float64"),
        ("1x8", "float64"),
    ],
)
def test_softmax_equals_the_dense_form_at_scale_200(reference, mesh, dtype):
    """24 rows a device; the tile of 7 does not divide them."""
    # Bfloat16 gradients are rounded to bfloat16 by both forms. The derivative by beta is a small
    # difference of large sums, so it is compared in float64 only.
    rtol, num_compared = {"float64": (1e-10, 4), "float32": (2e-4, 3), "bfloat16": (8e-3, 3)}[dtype]
    num_devices = np.prod(MESHES[mesh])
    objective = Softmax(weighted=True, differentiate_beta=True)
    tiled = functools.partial(streaming_loss, tile=7)
    with jax.enable_x64(dtype == "float64"):
        arrays = pairs(24 * num_devices, dtype=dtype)
        streaming, dense = (
            reference.differentiate(loss_fn, objective, MESHES[mesh])
            for loss_fn in (tiled, dense_loss)
        )
        for alpha, beta in itertools.product(ALPHAS, BETAS):
            found, expected = (
                loss(*arrays, 200.0, (alpha, beta), {}) for loss in (streaming, dense)
            )
            assert_same(found, expected, rtol, num_compared)


@pytest.mark.parametrize("mesh", ["1", "2x4"])
@pytest.mark.parametrize(
    "objective",
    [Softmax(weighted=False), Softmax(weighted=True, stop_weight_gradient=True), Sigmoid()],
    ids=["infonce", "constant_weights", "sigmoid"],
)
def test_other_members_equal_their_dense_form(reference, objective, mesh):
    arrays = pairs(16 * np.prod(MESHES[mesh]))
    parameters = (-5.0,) if isinstance(objective, Sigmoid) else (0.9, 0.5)
    found, expected = (
        reference.differentiate(loss_fn, objective, MESHES[mesh])(*arrays, 20.0, parameters, {})
        for loss_fn in (functools.partial(streaming_loss, tile=5), dense_loss)
    )
    assert_same(found, expected, 2e-5)


@pytest.mark.parametrize("impl", ["streaming", "gathered"])
def test_sigmoid_loss_equals_its_formula_in_float64(impl):
    image_emb, text_emb = pairs(32)
    x, t = np.float64(image_emb), np.float64(text_emb)
    scale, bias = 10.0, -3.0
    signs = 2 * np.eye(32) - 1
    margins = signs * (scale * x @ t.T + bias)
    expected = np.log1p(np.exp(-margins)).sum() / 32
    by_margin = -signs / (1 + np.exp(margins)) / 32
    expected_grads = (
        scale * by_margin @ t,
        scale * by_margin.T @ x,
        np.sum(by_margin * (x @ t.T)),
        by_margin.sum(),
    )
    value, grads = jax.jit(
        jax.value_and_grad(functools.partial(sigmoid_loss, impl=impl), argnums=(0, 1, 2, 3))
    )(image_emb, text_emb, scale, bias)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)


def compiled(impl, num_pairs, width, mesh_shape=(2, 4), **settings):
    """The value-and-gradient of the objective on eight devices, and its arguments."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(mesh_shape), ("data", "fsdp"))
    by_example = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    rows = jax.ShapeDtypeStruct((num_pairs, width), np.float32, sharding=by_example)
    step = jax.value_and_grad(
        functools.partial(contrastive_objective, mesh=mesh, impl=impl, **settings),
        argnums=(0, 1, 2),
        has_aux=True,
    )
    return step, (rows, rows, jax.ShapeDtypeStruct((), np.float32))


def temporary_bytes(impl, num_pairs, **settings):
    step, arguments = compiled(impl, num_pairs, 64, beta=0.25, **settings)
    ids = jax.ShapeDtypeStruct((num_pairs, 2), np.uint32, sharding=arguments[0].sharding)
    ids = {"pair_ids": ids} if settings else {}
    memory = jax.jit(step).lower(*arguments, **ids).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_memory_grows_with_the_local_batch_and_not_with_the_global_one():
    # Doubling the batch doubles [b, d] and quadruples [b, N].
    gathered = [temporary_bytes("gathered", num_pairs) for num_pairs in (8192, 16384)]
    assert gathered[1] > 3 * gathered[0]
    for settings in ({}, {"equal_pairs": "positive"}):
        small, large = (temporary_bytes("streaming", n, **settings) for n in (8192, 16384))
        assert large < 2.5 * small and large < gathered[1] / 4


def test_work_is_two_thirds_of_the_dense_form():
    work = {}
    for impl in ("streaming", "gathered"):
        step, arguments = compiled(impl, 512, 768, beta=0.25)
        work[impl] = count_flops(step, *arguments)
    # Four products of N x N x d against six.
    product = 2 * 512 * 512 * 768
    assert work["streaming"] == pytest.approx(4 * product)
    assert work["gathered"] == pytest.approx(6 * product)
