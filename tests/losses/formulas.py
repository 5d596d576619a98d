"""Ground truth of the loss tests: the defining formula in float64, and a common checker."""

import functools
import itertools

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

ALPHAS = (1.0, 0.999, 0.5)
BETAS = (0.0, 0.25, 0.5, 1.0)
SCALES = (1 / 0.07, 100.0, 200.0)
KINDS = ("aligned", "random", "adversarial", "collapsed", "opposed")
CASES = tuple(itertools.product(KINDS, SCALES, ALPHAS, BETAS))
NUM_PAIRS, WIDTH = 16, 8

# Of the value, and of the gradient relative to its largest entry.
TOLERANCES = {np.float32: (2e-5, 2e-4), np.float64: (1e-11, 1e-10)}


def defining_loss(
    image_emb, text_emb, scale, alpha, beta, *,
    constant_weights=False, equal_pairs="negative", is_equal=None, row_weights=None,
):  # fmt: skip
    """DiHT's formula as printed, with the weights and the ratio instead of the identity.

    Leading axes are batch axes, and arguments may be complex.

    Args:
        constant_weights: whether the weights of the negatives have no derivative.
        equal_pairs: the role of equal pairs, as in the loss.
        is_equal: [N, N], which pairs are equal; None: each pair equals only itself.
        row_weights: [N], weights of both directions; None: those of the mean.
    """
    logits = np.asarray(scale)[..., None, None] * (image_emb @ np.swapaxes(text_emb, -1, -2))
    alpha, beta = np.asarray(alpha)[..., None], np.asarray(beta)[..., None, None]
    num_pairs = logits.shape[-1]
    is_same = np.eye(num_pairs, dtype=bool)
    is_equal = is_same if is_equal is None else is_equal
    negative = ~is_same if equal_pairs == "negative" else ~is_equal
    positive = is_equal if equal_pairs == "positive" else is_same

    def direction(s):
        tilt = np.exp(beta * s) * negative
        weights = negative.sum(-1, keepdims=True) * tilt / tilt.sum(-1, keepdims=True)
        weights = weights.real if constant_weights else weights
        exps = np.exp(s)
        denominators = alpha * (exps * positive).sum(-1) + (weights * exps * negative).sum(-1)
        losses = -(np.log(exps / denominators[..., None]) * positive).sum(-1)
        return losses / positive.sum(-1)

    both = direction(logits) + direction(np.swapaxes(logits, -1, -2))
    return ((1 / (2 * num_pairs) if row_weights is None else row_weights) * both).sum(-1)


def complex_step(formula, *arguments):
    """Returns the value and the gradients by all arguments, exact to rounding, without autodiff."""
    step, sizes = 1e-30, [np.size(x) for x in arguments]
    directions = np.split(np.eye(sum(sizes)) * 1j * step, np.cumsum(sizes)[:-1], axis=1)
    moved = [x + d.reshape(-1, *np.shape(x)) for x, d in zip(arguments, directions, strict=True)]
    slopes = np.split(formula(*moved).imag / step, np.cumsum(sizes)[:-1])
    grads = [slope.reshape(np.shape(x)) for slope, x in zip(slopes, arguments, strict=True)]
    return formula(*(np.asarray(x) for x in arguments)), grads


@functools.cache
def embeddings(kind):
    """Returns float64 pairs [N, d] that are exact in float32."""
    rng = np.random.default_rng(7)

    def unit(rows):
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    image_emb = unit(rng.normal(size=(NUM_PAIRS, WIDTH)))
    if kind == "aligned":  # near-orthogonal classes: positives near 1, negatives near 0 and -1
        axes = np.concatenate([np.eye(WIDTH), -np.eye(WIDTH)])
        image_emb = unit(axes + 0.05 * rng.normal(size=axes.shape))
        text_emb = unit(axes + 0.05 * rng.normal(size=axes.shape))
    elif kind == "random":
        text_emb = unit(rng.normal(size=(NUM_PAIRS, WIDTH)))
    elif kind == "adversarial":  # the neighbour matches perfectly, the partner is opposite
        text_emb = np.roll(image_emb, 1, axis=0)
        text_emb[::2] = -image_emb[::2]
    else:  # all images near one point, all texts near the same ("opposed": its antipode)
        image_emb = unit(image_emb[:1] + 1e-3 * rng.normal(size=image_emb.shape))
        text_emb = unit(image_emb[:1] + 1e-3 * rng.normal(size=image_emb.shape))
        text_emb *= -1 if kind == "opposed" else 1
    return image_emb.astype(np.float64), text_emb.astype(np.float64)


@functools.cache
def truth(kind, scale, alpha, beta, constant_weights=False):
    """Returns the value, and the gradients by embeddings and scale."""
    formula = functools.partial(
        defining_loss, alpha=alpha, beta=beta, constant_weights=constant_weights
    )
    return complex_step(formula, *embeddings(kind), scale)


def find_errors(value_and_grads, cases=CASES, dtype=np.float32, constant_weights=False):
    """Returns the cases that `value_and_grads(image_emb, text_emb, scale, alpha, beta)` fails."""
    value_tolerance, grad_tolerance = TOLERANCES[dtype]
    errors = []
    for case in cases:
        kind, scale, alpha, beta = case
        # Rounding a logit near `scale` moves a gradient, a sum of terms of size scale/N, by this
        # much. It matters where these terms cancel (collapsed embeddings).
        floor = np.finfo(dtype).eps * scale * scale / NUM_PAIRS
        arrays = (*embeddings(kind), scale, alpha, beta)
        value, grads = value_and_grads(*(np.asarray(array, dtype) for array in arrays))
        true_value, true_grads = truth(*case, constant_weights)
        if not abs(float(value) - true_value) <= value_tolerance * (1 + abs(true_value)):
            errors.append(f"{case}: value {float(value)}, expected {true_value}")
        for name, grad, expected in zip(("image", "text", "scale"), grads, true_grads, strict=True):
            largest = np.max(np.abs(expected))
            error = np.max(np.abs(np.asarray(grad, np.float64) - expected))
            if not error <= grad_tolerance * largest + floor:
                errors.append(f"{case}: {name} gradient off by {error}, largest {largest}")
    return errors


def mesh_of(num_devices):
    return Mesh(np.asarray(jax.devices()[:num_devices]), ("data",))


def differentiate_on_mesh(local_loss, mesh, axis_name="data", check_vma=True):
    """Value and gradients of `local_loss(x, t, scale, alpha, beta)`, taken outside of shard_map."""
    rows, whole = PartitionSpec(axis_name), PartitionSpec()
    mapped = jax.shard_map(
        local_loss,
        mesh=mesh,
        in_specs=(rows, rows, whole, whole, whole),
        out_specs=whole,
        check_vma=check_vma,
    )
    return jax.jit(jax.value_and_grad(mapped, argnums=(0, 1, 2)))


def differentiate(loss_fn, objective, mesh_shape):
    """Returns the value and all gradients of a per-device loss, summed over the mesh.

    The last argument is a dict of further arrays with a row for each pair.
    """
    devices = np.asarray(jax.devices()[: np.prod(mesh_shape)]).reshape(mesh_shape)
    axes = ("data", "fsdp")
    rows, whole = PartitionSpec(axes), PartitionSpec()

    def local(image_emb, text_emb, scale, scalars, of_rows):
        arrays = (image_emb, text_emb, scale, scalars)
        loss, _ = loss_fn(*arrays, objective=objective, axis_name=axes, **of_rows)
        return jax.lax.psum(loss, axes)

    mapped = jax.shard_map(
        local,
        mesh=Mesh(devices, axes),
        in_specs=(rows, rows, whole, whole, rows),
        out_specs=whole,
    )
    return jax.jit(jax.value_and_grad(mapped, argnums=(0, 1, 2, 3)))
