"""The sigmoid loss as users call it against its formula; memory and work of both forms."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diht_jax.hardware.chips import count_flops
from diht_jax.losses import contrastive_objective, sigmoid_loss
from tests.losses import formulas


@pytest.mark.parametrize("impl", ["streaming", "gathered"])
def test_sigmoid_loss_equals_its_formula_in_float64(impl):
    x, t = formulas.embeddings("random")
    signs = 2 * np.eye(len(x)) - 1

    def formula(x, t, scale, bias):
        scale, bias = scale[..., None, None], bias[..., None, None]
        margins = signs * (scale * x @ np.swapaxes(t, -1, -2) + bias)
        return np.log(1 + np.exp(-margins)).sum((-2, -1)) / len(signs)

    expected, expected_grads = formulas.complex_step(formula, x, t, 10.0, -3.0)
    value, grads = jax.jit(
        jax.value_and_grad(functools.partial(sigmoid_loss, impl=impl), argnums=(0, 1, 2, 3))
    )(np.float32(x), np.float32(t), 10.0, -3.0)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-6)


def compiled(impl, num_pairs, width, mesh_shape=(2, 4), **settings):
    """Compiles the objective's value-and-gradient on eight devices; returns it and its inputs."""
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
    gathered = temporary_bytes("gathered", 16384)
    for settings in ({}, {"equal_pairs": "positive"}):
        small, large = (temporary_bytes("streaming", n, **settings) for n in (8192, 16384))
        assert large < 2.5 * small and large < gathered / 4


@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_work_is_two_thirds_of_the_dense_form_also_of_hard_negatives(beta):
    """Four products of N x N x d instead of six."""
    for impl, num_products in (("streaming", 4), ("gathered", 6)):
        step, arguments = compiled(impl, 512, 768, beta=beta)
        work = count_flops(step, *arguments)
        assert work == pytest.approx(num_products * 2 * 512 * 512 * 768), impl
