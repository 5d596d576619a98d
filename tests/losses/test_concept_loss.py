"""The concept loss against the dense float64 cross-entropy, and its gradient by hand."""

import functools

import jax
import numpy as np
import pytest

from diht_jax.losses import concept_loss
from diht_jax.losses.concepts import concept_losses_in_chunks

NUM_ROWS, VOCABULARY, K = 12, 50, 5


@pytest.fixture(scope="module")
def labels():
    """Logits up to 40, distinct ids, probabilities; rows 3 and 7 are unlabelled."""
    rng = np.random.default_rng(0)
    logits = 20 * rng.normal(size=(NUM_ROWS, VOCABULARY))
    ids = np.stack([rng.permutation(VOCABULARY)[:K] for _ in range(NUM_ROWS)]).astype(np.int32)
    probs = rng.dirichlet(np.ones(K), size=NUM_ROWS)
    probs[[3, 7]] = 0
    ids[3], ids[7] = -1, 10**6
    return logits.astype(np.float32), ids, probs.astype(np.float32)


def dense_targets(ids, probs):
    targets = np.zeros((NUM_ROWS, VOCABULARY))
    for row in range(NUM_ROWS):
        if probs[row].sum() > 0:
            targets[row, ids[row]] = probs[row]
    return targets


def test_value_and_gradient_equal_the_dense_formula_in_float64(labels):
    logits, ids, probs = labels
    targets = dense_targets(ids, probs)
    z = np.float64(logits)
    log_softmax = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True))
    log_softmax -= z.max(1, keepdims=True)
    expected = -(targets * log_softmax).sum() / (NUM_ROWS - 2)
    by_logits = (np.exp(log_softmax) * targets.sum(1, keepdims=True) - targets) / (NUM_ROWS - 2)
    value, grad = jax.jit(jax.value_and_grad(concept_loss))(logits, ids, probs)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, by_logits, atol=1e-6)
    assert not grad[3].any() and not grad[7].any()


def test_huge_logits_do_not_overflow():
    logits = np.float32([[3e4, -3e4, 0.0]])
    value, grad = jax.value_and_grad(concept_loss)(
        logits, np.int32([[1, 0]]), np.float32([[0.75, 0.25]])
    )
    np.testing.assert_allclose(value, 4.5e4, rtol=1e-6)
    np.testing.assert_allclose(grad, [[0.75, -0.75, 0.0]], atol=1e-6)


@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_chunks_change_neither_value_nor_gradient(labels, chunk_rows):
    _, ids, probs = labels
    rng = np.random.default_rng(1)
    features, kernel, bias = (
        rng.normal(size=shape).astype(np.float32) for shape in ((NUM_ROWS, 8), (8, 50), (50,))
    )

    def whole(features, kernel, bias):
        return concept_loss(features @ kernel + bias, ids, probs)

    def chunked(features, kernel, bias):
        losses = concept_losses_in_chunks(features, kernel, bias, ids, probs, chunk_rows=chunk_rows)
        return losses.sum() / (probs.sum(axis=1) > 0).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(fn, argnums=(0, 1, 2)))(features, kernel, bias)
        for fn in (chunked, whole)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_chunks_bound_the_memory():
    """The logits of 512 rows and 10,000 concepts take 20 MB."""
    shapes = ((512, 64), (64, 10_000), (10_000,), (512, 10), (512, 10))
    dtypes = (np.float32, np.float32, np.float32, np.int32, np.float32)
    arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, dtypes, strict=True)]

    def temporaries(chunk_rows):
        def loss(*arguments):
            losses = functools.partial(concept_losses_in_chunks, chunk_rows=chunk_rows)
            return losses(*arguments).sum()

        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arguments).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(512) > 20e6
    assert temporaries(64) < temporaries(512) / 3
