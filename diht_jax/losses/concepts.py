"""The concept-distillation loss: cross-entropy of a student's logits with a teacher's labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer


def concept_loss(
    logits: Float[Array, "b v"], ids: Integer[Array, "b k"], probs: Float[Array, "b k"]
) -> Float[Array, ""]:
    """Computes the soft-target cross-entropy, averaged over the labelled rows.

    Args:
        logits: of the student.
        ids: concepts in [0, v); an id with a probability of 0 is ignored.
        probs: sum to 1 in a labelled row, and are all 0 in an unlabelled one.

    Returns:
        At least float32; 0 if no row is labelled.

    Raises:
        ValueError: the shapes do not match.

    Source: DiHT, arXiv 2301.02280, "Concept distillation".
    """
    losses, is_labelled = concept_losses(logits, ids, probs)
    return mean_over_labelled(losses, is_labelled)


def concept_losses(
    logits: Float[Array, "b v"], ids: Integer[Array, "b k"], probs: Float[Array, "b k"]
) -> tuple[Float[Array, " b"], Bool[Array, " b"]]:
    """Computes the concept loss of every row; the arguments are those of `concept_loss`.

    `-sum_k p_k log softmax(z)_{id_k} = logsumexp(z) - sum_k p_k z_{id_k}`, so no [b, v] array of
    targets is needed.

    Returns:
        Losses, at least float32 and 0 for unlabelled rows, and a mask of the labelled rows.
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
    # The total is 1 up to the rounding of stored probabilities. Multiplying by it makes the
    # gradient of a row's logits sum to exactly 0.
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
    """Computes the loss of every row for a linear head, with `chunk_rows` rows of logits at a time.

    The backward pass recomputes the logits of each chunk, unless there is only one chunk.

    Args:
        features, kernel, bias: input and parameters of the head.
        ids, probs: see `concept_loss`.
        chunk_rows: upper bound; the chunk size is the largest divisor of b up to it.
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
    """Computes `function(rows)` in chunks of rows, which the backward pass recomputes.

    Args:
        function: maps a tree of arrays [b, ...] to a tree of arrays [b]; row i of the result must
            depend only on row i.
        rows: tree of arrays [b, ...].
        chunk_rows: upper bound; the chunk size is the largest divisor of b up to it. A single
            chunk is not recomputed.
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
    """Returns the mean over the labelled rows, or 0 if there are none."""
    return jnp.sum(losses) / jnp.maximum(jnp.sum(is_labelled), 1)
