"""The gradient noise scale against its definition, for a loss whose noise is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from diht_jax.training.gradient_noise import (
    gradients_of_halves,
    micro_batch_of_halves,
    with_noise_scale,
)

WIDTH, BATCH_SIZE = 50, 64


def test_it_is_the_ratio_of_the_known_variance_to_the_known_gradient():
    """The loss mean_i <w, x_i> has the gradients x_i, with mean 0.5 and variance 4 in each number:
    tr(Sigma) / |G|^2 = 4 / 0.25 = 16."""
    rng = np.random.default_rng(0)
    measured = []
    for _ in range(40):
        x = jnp.asarray(0.5 + 2.0 * rng.standard_normal((BATCH_SIZE, WIDTH)), jnp.float32)
        grads, metrics = gradients_of_halves(
            lambda w, examples: examples["x"] @ w,
            lambda encoded, w: (jnp.mean(encoded), {}),
            *(jnp.zeros(WIDTH), {"x": x}),
        )
        np.testing.assert_allclose(grads, jnp.mean(x, axis=0), rtol=1e-5, atol=1e-6)
        # The estimates of arXiv 1812.06162, appendix A.1, from batches of 32 and of 64.
        small = np.mean([np.sum(np.mean(x[i::2], axis=0) ** 2) for i in range(2)])
        big = np.sum(np.mean(x, axis=0) ** 2)
        np.testing.assert_allclose(metrics["grad_signal"], 2 * big - small, rtol=1e-3)
        variance = (small - big) / (1 / 32 - 1 / 64)
        np.testing.assert_allclose(BATCH_SIZE * metrics["grad_noise"], variance, rtol=1e-3)
        measured.append({name: float(value) for name, value in metrics.items()})
    means = {name: np.mean([row[name] for row in measured]) for name in measured[0]}
    scalars = with_noise_scale(means, BATCH_SIZE)
    assert scalars["noise_scale"] == pytest.approx(16, rel=0.1)
    assert with_noise_scale({"grad_noise": 1.0, "grad_signal": -0.1}, 64).keys() == {
        *("grad_noise", "grad_signal")
    }
    assert with_noise_scale({"loss": 1.0}, 64) == {"loss": 1.0}


def test_halves_have_micro_batches_of_their_own():
    assert micro_batch_of_halves(None, 64, 8) is None
    assert micro_batch_of_halves(16, 64, 8) == 16
    assert micro_batch_of_halves(16, 48, 8) == 8  # three micro-batches become six of half the size
    with pytest.raises(ValueError, match="expected config.micro_batch=24 to give each of the 8"):
        micro_batch_of_halves(24, 72, 8)
    with pytest.raises(
        ValueError, match="expected config.data.batch_size=24 to give each of the 8"
    ):
        micro_batch_of_halves(None, 24, 8)
