"""The gathered form of the losses: every device gathers all embeddings and holds [b, N] logits.

The readable reference that `streaming.py` is tested against, and the faster form where many
devices have few examples each (`choice.py`). Gradients are JAX's own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Integer

from diht_jax.losses.objective import AxisName, Objective, PairStatistics, Scalars


def dense_loss(
    image_emb: Float[Array, "b d"],
    text_emb: Float[Array, "b d"],
    logit_scale: ArrayLike,
    scalars: Scalars,
    *,
    objective: Objective,
    axis_name: AxisName,
    pair_ids: Integer[Array, "b k"] | None = None,
    row_weights: Float[Array, " b"] | None = None,
) -> tuple[Float[Array, ""], PairStatistics]:
    """Sums the losses of the local rows in both directions; see `streaming.streaming_loss`."""
    i2t, t2i, is_positive = similarity_blocks(image_emb, text_emb, axis_name)
    scale = jnp.asarray(logit_scale, i2t.dtype)
    is_negative, num_negatives, more = ~is_positive, None, ()
    if pair_ids is not None:
        all_ids = jax.lax.all_gather(pair_ids, axis_name, tiled=True) if axis_name else pair_ids
        is_equal = jnp.all(pair_ids[:, None] == all_ids[None, :], axis=-1)
        is_negative = ~(is_positive | is_equal)
        num_negatives = jnp.sum(is_negative, axis=1).astype(i2t.dtype)
        more = (is_equal & ~is_positive,)
    image_part, text_part = (
        objective.loss_of_rows(scale * block, is_positive, scalars, *more) for block in (i2t, t2i)
    )
    if row_weights is not None:
        image_part, text_part = row_weights * image_part, row_weights * text_part
    total = jnp.sum(image_part) + jnp.sum(text_part)
    image_hardest, image_ties = hardest(i2t, is_negative)
    text_hardest, text_ties = hardest(t2i, is_negative)
    positive = jnp.sum(i2t, axis=1, where=is_positive)
    return total, PairStatistics(
        positive, image_hardest, image_ties, text_hardest, text_ties, num_negatives
    )


def similarity_blocks(
    image_emb: Float[Array, "b d"], text_emb: Float[Array, "b d"], axis_name: AxisName = None
) -> tuple[Float[Array, "b N"], Float[Array, "b N"], Bool[Array, "b N"]]:
    """Similarities of the local rows with the global batch.

    Args:
        image_emb, text_emb: local rows.
        axis_name: see `contrastive.contrastive_loss`.

    Returns:
        Image to text, and text to image, at least float32; and where the column is the row's own
        pair.
    """
    all_images, all_texts = image_emb, text_emb
    first_row = 0
    if axis_name:
        all_images = jax.lax.all_gather(image_emb, axis_name, tiled=True)
        all_texts = jax.lax.all_gather(text_emb, axis_name, tiled=True)
        first_row = jax.lax.axis_index(axis_name) * image_emb.shape[0]
    own_column = first_row + jnp.arange(image_emb.shape[0])
    is_positive = own_column[:, None] == jnp.arange(all_texts.shape[0])[None, :]
    return inner_products(image_emb, all_texts), inner_products(text_emb, all_images), is_positive


def inner_products(rows: Float[Array, "m d"], columns: Float[Array, "n d"]) -> Float[Array, "m n"]:
    """`rows @ columns.T`, accumulated in at least float32.

    At scale 100 a product rounded to bfloat16 would be wrong by whole units of the logit, hence
    the highest precision (it costs nothing for bfloat16 inputs, whose products are exact).
    """
    return jax.lax.dot_general(
        rows,
        columns,
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(rows.dtype, jnp.float32),
    )


def product(
    grad: Float[Array, "rows columns"], emb: Float[Array, "n d"], axis: int
) -> Float[Array, "m d"]:
    """`grad @ emb` for axis 1, `grad.T @ emb` for axis 0, in the dtype of `grad`."""
    return jax.lax.dot_general(
        grad,
        emb.astype(grad.dtype),
        (((axis,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )


def hardest(
    block: Float[Array, "b N"], is_negative: Bool[Array, "b N"]
) -> tuple[Float[Array, " b"], Float[Array, " b"]]:
    """The highest similarity with a wrong partner, and how many reach it."""
    block = jax.lax.stop_gradient(block)
    hardest = jnp.max(block, axis=1, where=is_negative, initial=-jnp.inf)
    return hardest, jnp.sum(is_negative & (block == hardest[:, None]), axis=1).astype(block.dtype)
