"""Linear layers: gradients in bfloat16 against float64."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diht_jax.models.layers import Linear


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
