"""The activations against torch, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diht_jax.models.layers import activate

REFERENCES = {
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_torch_in_float64(name, dtype, tolerance):
    x = jnp.linspace(-9, 9, 1001).astype(dtype)
    gradient = jnp.cos(jnp.linspace(0, 50, 1001)).astype(dtype)
    value, pull = jax.vjp(lambda x: activate(name, x), x)
    (slope,) = pull(gradient)
    assert value.dtype == slope.dtype == x.dtype
    exact = torch.tensor(np.asarray(x, np.float64), requires_grad=True)
    reference = REFERENCES[name](exact)
    reference.backward(torch.tensor(np.asarray(gradient, np.float64)))
    for ours, theirs in ((value, reference.detach()), (slope, exact.grad)):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs.numpy(), rtol=tolerance, atol=tolerance
        )
