"""The gradient noise scale: how many examples a batch needs until more of them help little.

The simple noise scale `tr(Sigma) / |G|^2` of McCandlish et al. (arXiv 1812.06162), from gradients
of two sizes of a batch: all of it, and its even and odd examples.

Their estimate takes the loss for a mean over examples, and a contrastive loss is none: an example
is a negative of all others. But its gradient is a sum over examples, `g = sum_i v_i` with
`v_i = J_i^T c_i`: the derivative `c_i` of the loss by the embeddings of example i, back through its
own encoding. With `a` and `b` the sums of even and odd examples, `E |a - b|^2 = N tr(Cov v)`, and
`|g|^2 - |a - b|^2` estimates the gradient without it. So this is the noise from which examples are
encoded, against the negatives of the batch at hand. What an example does to the derivatives `c` of
the others, as their negative, is not in it.

Both sums come out of one backward pass over halves of the batch. No loss is taken of a half, so it
holds for any loss, with micro-batches (GradCache) and with split parameters, and does not depend on
the mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any
NOISE, SIGNAL, NOISE_SCALE = "grad_noise", "grad_signal", "noise_scale"


def micro_batch_of_halves(micro_batch: int | None, batch_size: int, num_devices: int) -> int | None:
    """The micro-batch for one half of the batch: as large as that of the run, or half of it.

    Args:
        micro_batch: `config.micro_batch`, right for the whole batch.
        batch_size: global.
        num_devices: of the mesh.

    Raises:
        ValueError: a device cannot halve its examples.
    """
    halved = micro_batch is not None and (batch_size // 2) % micro_batch != 0
    examples = micro_batch if halved else batch_size
    if examples % (2 * num_devices):
        key = "micro_batch" if halved else "data.batch_size"
        raise ValueError(
            f"config.gradient_noise=True: expected config.{key}={examples} to give each of the "
            f"{num_devices} devices an even number of examples"
        )
    return micro_batch // 2 if halved else micro_batch


def gradients_of_halves(
    encode: Callable[[Tree, dict[str, jax.Array]], Tree],
    loss_of: Callable[[Tree, Tree], tuple[jax.Array, dict[str, jax.Array]]],
    trained: Tree,
    examples: dict[str, jax.Array],
) -> tuple[Tree, dict[str, jax.Array]]:
    """The gradient of the batch, and metrics with `grad_noise` and `grad_signal`.

    Args:
        encode: from trained parameters and some of the examples, what `loss_of` needs of them.
        loss_of: from all of that and the trained parameters, the loss and metrics. What it derives
            by these parameters themselves, such as the logit scale, counts as free of noise.
        trained: parameters.
        examples: arrays [N, ...], N even.
    """
    halves = [
        jax.tree.map(lambda x, i=i: x.reshape(-1, 2, *x.shape[1:])[:, i], examples)
        for i in range(2)
    ]

    def loss_fn(copies: tuple[Tree, Tree]) -> tuple[jax.Array, dict[str, jax.Array]]:
        encoded = [encode(copy, half) for copy, half in zip(copies, halves, strict=True)]
        joined = jax.tree.map(
            lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:]), *encoded
        )
        return loss_of(joined, jax.tree.map(lambda a, b: (a + b) / 2, *copies))

    (_, metrics), (even, odd) = jax.value_and_grad(loss_fn, has_aux=True)((trained, trained))
    grads = jax.tree.map(jnp.add, even, odd)
    noise = optax.tree.norm(jax.tree.map(jnp.subtract, even, odd), squared=True)
    signal = optax.tree.norm(grads, squared=True) - noise
    return grads, {**metrics, NOISE: noise, SIGNAL: signal}


def with_noise_scale(scalars: dict[str, float], batch_size: int) -> dict[str, float]:
    """Means over some steps, with the noise scale in examples where they are enough for one.

    The ratio of means, since a mean of ratios is far off. Absent where the steps' noise hides the
    gradient, so that the mean of `grad_signal` is not positive.
    """
    if scalars.get(SIGNAL, 0.0) <= 0.0:
        return scalars
    return {**scalars, NOISE_SCALE: batch_size * scalars[NOISE] / scalars[SIGNAL]}
