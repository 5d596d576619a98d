"""Linear classifiers on embeddings: fits many settings at once, on the devices.

The problem and the feasible set are convex, and the step size follows from the data, so only the
settings themselves need tuning. This module knows nothing of sampling, files or tasks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diht_jax import sharding

# Limit of logits held at once on a device, over all draws and settings of a call: 128 MiB.
_LOGITS_AT_ONCE = 2**25
_MOST_EXAMPLES_A_BLOCK = 4096


class ProbeSettings(NamedTuple):
    """Limits on, or a penalty for, a classifier's distance from its start."""

    radius: float = math.inf  # upper bound of the Euclidean norm of W (all entries)
    bias_radius: float = math.inf  # upper bound of the norm of b
    # Factor `c` of the penalty `c / 2 * ||W||^2` added to the mean loss.
    weight_decay: float = 0.0


@dataclasses.dataclass(frozen=True)
class LabelledEmbeddings:
    """Embeddings with their labels."""

    image_emb: np.ndarray  # float32 [n, d]
    labels: np.ndarray  # int32 [n]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> LabelledEmbeddings:
        """Returns the examples at `indices`."""
        return LabelledEmbeddings(self.image_emb[indices], self.labels[indices])


class FittedProbes(NamedTuple):
    """The best setting of each of D draws."""

    accuracy: np.ndarray  # float64 [D, G], validation accuracy of every setting
    chosen: np.ndarray  # int [D], the setting with the best accuracy; the first among ties
    weights: np.ndarray  # float32 [D, d, C], chosen setting, start included
    bias: np.ndarray  # float32 [D, C]


def project_onto_ball(x: jax.Array, radius: jax.Array | float) -> jax.Array:
    """Projects `x` onto the ball `||x||_2 <= radius`; the norm is over all entries."""
    norm = jnp.linalg.norm(x.ravel())
    return jnp.where(norm > radius, x * (radius / jnp.maximum(norm, 1e-30)), x)


def fit_probes(
    draws: Sequence[LabelledEmbeddings],
    validation: LabelledEmbeddings,
    start: np.ndarray,
    settings: Sequence[ProbeSettings],
    *,
    num_steps: int = 500,
) -> FittedProbes:
    """Fits every setting to every draw; selects the best setting of each draw on `validation`.

    Solves this problem of DiHT (arXiv 2301.02280, section "Few-shot linear probing"), where the
    paper's delta is `radius`,

        min_{||W||_2 <= radius, ||b||_2 <= bias_radius}
            mean_i CE(y_i, x_i^T (W + start) + b) + weight_decay / 2 * ||W||_2^2

    by projected gradient descent. Choices of this implementation: the norm of W is over all
    entries; the loss is a mean; each step uses all examples. The step size is 1 / L, with L a bound
    on the curvature. FISTA momentum (Beck and Teboulle, "A Fast Iterative Shrinkage-Thresholding
    Algorithm", 2009) restarts where it points uphill (O'Donoghue and Candes, arXiv 1204.3982).

    Args:
        draws: training examples, the same number n in each.
        validation: examples for comparing the settings.
        start: float [d, C], the initial classifier; zeros for a probe from scratch.
        settings: G settings, the most cautious first.
        num_steps: gradient steps.
    """
    assert len({len(draw) for draw in draws}) == 1 and len(draws[0]) and len(validation)
    mesh = sharding.create_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    num_classes = start.shape[1]
    train, held_out = _stack_blocks(draws, num_classes), _stack_blocks([validation], num_classes)
    train, held_out, start = jax.device_put(
        (train, held_out, np.asarray(start, np.float32)), sharding.replicated(mesh)
    )
    fixed = ((*train, _curvatures(train)), held_out, start)
    block = max(labels.shape[2] for _, labels, _ in (train, held_out))
    per_setting = len(draws) * num_classes * block
    chunk = mesh.size * max(1, min(_LOGITS_AT_ONCE // per_setting, -(-len(settings) // mesh.size)))
    accuracy = []
    best: list[tuple[float, Any, Any]] = [(-1.0, None, None)] * len(draws)
    table = np.array(settings, np.float32)
    for first in range(0, len(table), chunk):
        part = table[first : first + chunk]
        padded = np.pad(part, ((0, chunk - len(part)), (0, 0)), "edge")  # one shape for all chunks
        padded = jax.device_put(padded, sharding.batch_sharding(mesh))
        hits, weights, bias = _fit_chunk(*fixed, padded, num_steps=num_steps)
        accuracy.append(np.asarray(hits, np.float64)[: len(part)].T / len(validation))
        for draw, values in enumerate(accuracy[-1]):
            i = int(values.argmax())
            if values[i] > best[draw][0]:
                best[draw] = values[i], np.asarray(weights[i, draw]), np.asarray(bias[i, draw])
    accuracies = np.concatenate(accuracy, axis=1)
    return FittedProbes(
        accuracy=accuracies,
        chosen=accuracies.argmax(axis=1),
        weights=np.stack([weights for _, weights, _ in best]),
        bias=np.stack([bias for _, _, bias in best]),
    )


def probe_accuracy(examples: LabelledEmbeddings, weights: np.ndarray, bias: np.ndarray) -> float:
    """Returns the accuracy of a linear classifier with weights [d, C] and bias [C]."""
    blocks = (x[0] for x in _stack_blocks([examples], weights.shape[1]))
    return int(_count_hits(*blocks, weights, bias)) / len(examples)


def _stack_blocks(
    draws: Sequence[LabelledEmbeddings], num_classes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns embeddings [D, blocks, block, d], and labels and mask [D, blocks, block]."""
    size = len(draws[0])
    most = max(1, _LOGITS_AT_ONCE // (8 * num_classes * len(draws)))
    count = -(-size // min(most, _MOST_EXAMPLES_A_BLOCK))
    block = -(-size // count)
    padding = count * block - size

    def stack(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
        stacked = np.stack(arrays).astype(dtype)
        filled = np.pad(stacked, [(0, 0), (0, padding)] + [(0, 0)] * (stacked.ndim - 2))
        return filled.reshape(len(draws), count, block, *stacked.shape[2:])

    return (
        stack([draw.image_emb for draw in draws], np.float32),
        stack([draw.labels for draw in draws], np.int32),
        stack([np.ones(size) for _ in draws], np.float32),
    )


@functools.partial(jax.jit, static_argnames="num_steps")
def _fit_chunk(train, held_out, start, settings, *, num_steps):
    """Returns hits [G, D], weights [G, D, d, C] and bias [G, D, C] for settings [G, 3]."""
    held_out = jax.tree.map(lambda x: x[0], held_out)

    def fit(setting, image_emb, labels, mask, curvature):
        moved, bias = _fit_one(image_emb, labels, mask, curvature, start, setting, num_steps)
        weights = start + moved
        return _count_hits(*held_out, weights, bias), weights, bias

    over_draws = jax.vmap(fit, in_axes=(None, 0, 0, 0, 0))
    return jax.vmap(over_draws, in_axes=(0, None, None, None, None))(settings, *train)


def _fit_one(image_emb, labels, mask, curvature, start, setting, num_steps):
    """Returns the learned offset W [d, C] and the bias [C]; examples as in `_stack_blocks`."""
    radius, bias_radius, weight_decay = setting
    step_size = 1.0 / (curvature + weight_decay)
    num_examples = mask.sum()

    def gradient(weights, bias):
        def add_block(total, block):
            x, y, valid = block
            logits = jnp.matmul(x, start + weights, precision="highest") + bias
            error = jax.nn.softmax(logits) - jax.nn.one_hot(y, logits.shape[-1])
            error = error * (valid / num_examples)[:, None]
            return (
                total[0] + jnp.matmul(x.T, error, precision="highest"),
                total[1] + error.sum(axis=0),
            ), None

        nothing = (jnp.zeros_like(weights), jnp.zeros_like(bias))
        (d_weights, d_bias), _ = jax.lax.scan(add_block, nothing, (image_emb, labels, mask))
        return d_weights + weight_decay * weights, d_bias

    def step(_, carry):
        now, ahead, momentum = carry
        slope = gradient(*ahead)
        new = (
            project_onto_ball(ahead[0] - step_size * slope[0], radius),
            project_onto_ball(ahead[1] - step_size * slope[1], bias_radius),
        )
        uphill = sum(jnp.vdot(a - n, n - old) for a, n, old in zip(ahead, new, now, strict=True))
        momentum = jnp.where(uphill > 0, 1.0, momentum)
        next_momentum = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        push = jnp.where(uphill > 0, 0.0, (momentum - 1) / next_momentum)
        ahead = tuple(n + push * (n - old) for n, old in zip(new, now, strict=True))
        return new, ahead, next_momentum

    zero = (jnp.zeros_like(start), jnp.zeros(start.shape[1], start.dtype))
    (weights, bias), _, _ = jax.lax.fori_loop(0, num_steps, step, (zero, zero, jnp.float32(1)))
    return weights, bias


def _curvatures(train: tuple[jax.Array, jax.Array, jax.Array]) -> np.ndarray:
    """Bounds the largest curvature of each draw's mean loss in (W, b): float32 [D].

    The Hessian of cross-entropy with respect to the logits is at most 1/2 (Böhning 1992), so the
    bound is half of the largest eigenvalue of the mean of [x, 1] [x, 1]^T.

    NumPy computes the eigenvalues: jaxlib 0.10 waits for a batch of them within XLA's CPU threads,
    so several CPU devices that do this at the same time may wait for each other forever.
    """
    image_emb, _, mask = train
    return 0.5 * np.linalg.eigvalsh(np.asarray(_second_moments(image_emb, mask)))[:, -1]


@jax.jit
@jax.vmap
def _second_moments(image_emb, mask):
    x = image_emb.reshape(-1, image_emb.shape[-1])
    valid = mask.reshape(-1)
    x = jnp.concatenate([x, jnp.ones((len(x), 1), x.dtype)], axis=1) * valid[:, None]
    return jnp.matmul(x.T, x, precision="highest") / valid.sum()


@jax.jit
def _count_hits(image_emb, labels, mask, weights, bias):
    def add_block(hits, block):
        x, y, valid = block
        logits = jnp.matmul(x, weights, precision="highest") + bias
        return hits + ((jnp.argmax(logits, axis=-1) == y) * valid).sum(), None

    return jax.lax.scan(add_block, jnp.float32(0), (image_emb, labels, mask))[0]
