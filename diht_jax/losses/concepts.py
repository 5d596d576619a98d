"""The concept-distillation loss: a student's concept logits against a teacher's few labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer


def concept_loss(
    logits: Float[Array, "b v"], ids: Integer[Array, "b k"], probs: Float[Array, "b k"]
) -> Float[Array, ""]:
    """Soft-target cross-entropy, the mean over the labelled rows.

    Args:
        logits: of the student.
        ids: concepts in [0, v); an id with a probability of 0 does not matter.
        probs: those of a row sum to 1, or are all 0: an unlabelled row.

    Returns:
        At least float32; 0 if no row is labelled.

    Raises:
        ValueError: shapes that do not fit.

    Source: DiHT, arXiv 2301.02280, "Concept distillation".
    """
    losses, is_labelled = concept_losses(logits, ids, probs)
    return mean_over_labelled(losses, is_labelled)


def concept_losses(
    logits: Float[Array, "b v"], ids: Integer[Array, "b k"], probs: Float[Array, "b k"]
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """The loss of every row by itself; arguments as for `concept_loss`.

    `-sum_k p_k log softmax(z)_{id_k} = logsumexp(z) - sum_k p_k z_{id_k}`: the targets never
    become an array [b, v].

    Returns:
        Losses, at least float32, 0 for unlabelled rows; and which rows are labelled.
    """
    if logits.ndim != 2 or ids.ndim != 2 or ids.shape != probs.shape or len(ids) != len(logits):
        raise ValueError(
            "expected logits [b, v], ids [b, k] and probs [b, k], got "
            f"{logits.shape}, {ids.shape} and {probs.shape}"
        )
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    probs = probs.astype(logits.dtype)
    total = jnp.sum(probs, axis=1)
    chosen = jnp.take_along_axis(logits, jnp.where(probs > 0, ids, 0), axis=1)
    # The total is 1 up to the rounding of stored probabilities; with it, the gradient of a row's
    # logits sums to 0 exactly.
    losses = total * jax.nn.logsumexp(logits, axis=1) - jnp.sum(probs * chosen, axis=1)
    return losses, total > 0


def concept_losses_in_chunks(
    features: Float[Array, "b width"],
    kernel: Float[Array, "width v"],
    bias: Float[Array, " v"] | Float[Array, ""],
    ids: Integer[Array, "b k"],
    probs: Float[Array, "b k"],
    *,
    chunk_rows: int,
) -> Float[Array, " b"]:
    """The loss of every row for a linear head, with the logits of `chunk_rows` rows at a time.

    The backward pass makes the logits of a chunk again; a single chunk keeps them.

    Args:
        features, kernel, bias: of the head.
        ids, probs: see `concept_loss`.
        chunk_rows: at most; the largest divisor of b up to it is taken.
    """

    def of_chunk(chunk: tuple[jax.Array, ...]) -> jax.Array:
        features, ids, probs = chunk
        logits = jax.lax.dot_general(
            features,
            kernel.astype(features.dtype),
            (((1,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        losses, _ = concept_losses(logits + bias, ids, probs)
        return losses

    return map_in_chunks(of_chunk, (features, ids, probs), chunk_rows)


def map_in_chunks(function: Callable[[Any], Any], rows: Any, chunk_rows: int) -> Any:
    """`function(rows)`, computed for some rows at a time, and again in the backward pass.

    Args:
        function: from a tree of arrays [b, ...] to a tree of arrays [b]; row i of the result
            depends on row i alone.
        rows: tree of arrays [b, ...].
        chunk_rows: rows at a time, at most; the largest divisor of b up to it is taken. A single
            chunk is not computed again.
    """
    num_rows = len(jax.tree.leaves(rows)[0])
    chunk_rows = max(n for n in range(1, min(chunk_rows, num_rows) + 1) if num_rows % n == 0)
    if chunk_rows == num_rows:
        return function(rows)
    chunks = jax.tree.map(lambda x: x.reshape(-1, chunk_rows, *x.shape[1:]), rows)
    found = jax.lax.map(jax.checkpoint(function), chunks)
    return jax.tree.map(lambda x: x.reshape(num_rows), found)


def mean_over_labelled(
    losses: Float[Array, " b"], is_labelled: Bool[Array, " b"]
) -> Float[Array, ""]:
    """The mean over labelled rows, 0 if there are none."""
    return jnp.sum(losses) / jnp.maximum(jnp.sum(is_labelled), 1)
