"""Linear layers in bfloat16 against float64, and activations against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from diht_jax.models.layers import ACTIVATIONS, Linear


def test_the_gradient_of_a_bias_of_many_rows_is_off_by_no_more_than_its_last_digit():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50_000, 8)).astype(jnp.bfloat16)
    gradient = (rng.standard_normal((50_000, 64)) + 0.05).astype(jnp.bfloat16)
    layer = Linear(8, 64, dtype=jnp.bfloat16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.float32_bias_gradient = True
    graphdef, params = nnx.split(layer)
    _, pullback = jax.vjp(lambda params: nnx.merge(graphdef, params)(x), params)
    found = np.asarray(pullback(jnp.asarray(gradient))[0]["bias"][...], np.float64)
    exact = gradient.astype(np.float64).sum(axis=0)
    np.testing.assert_allclose(found, exact, rtol=0, atol=2**-8 * np.abs(exact).max())


REFERENCES = {
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_torch_in_float64(name, dtype, tolerance):
    x = jnp.linspace(-9, 9, 1001).astype(dtype)
    gradient = jnp.cos(jnp.linspace(0, 50, 1001)).astype(dtype)
    value, pull = jax.vjp(ACTIVATIONS[name], x)
    (slope,) = pull(gradient)
    assert value.dtype == slope.dtype == x.dtype
    exact = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    reference = REFERENCES[name](exact)
    reference.backward(torch.tensor(np.asarray(gradient, np.float64)))
    for ours, theirs in ((value, reference.detach()), (slope, exact.grad)):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs.numpy(), rtol=tolerance, atol=tolerance
        )
