"""The streaming form of the losses: memory O(b d + tile^2) per device, exact on any mesh.

Images stay on their device. Blocks of texts travel round the ring of devices with their column
statistics. The forward pass computes each block of logits once, for both directions. The backward
pass recomputes it and sends the gradients of the texts round the ring. No device ever holds a
[b, N] or [N, d] array, and tiles within a block bound the memory.

Neighbours may gather their images; the texts then travel from group to group (`ring.py`). A member
computes the rows of its whole group against the texts that visit it, and the group merges
statistics and gradients of the images after the last round.

Transfers are sent before the matrix products of a round: the next block of texts, and the previous
devices' sums for the current block, to which this device then adds its part. Every transfer can
therefore overlap with the products of a whole round.

The objective defines the sums (`objective.py`).

Source: ring attention's communication (arXiv 2310.01889) and the online log-sum-exp of Milakov
and Gimelshein (arXiv 1805.02867), applied to both directions of DiHT's loss at once. Ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from diht_jax.losses.dense import inner_products, product
from diht_jax.losses.objective import (
    AxisName,
    Masks,
    Objective,
    PairStatistics,
    Rows,
    RowSlopes,
    RowStatistics,
    Scalars,
    Tile,
    TileMask,
)
from diht_jax.losses.ring import Ring, at, put, vary, varying_axes, zeros

_Accumulate = Callable[..., tuple[jax.Array, ...]]


def streaming_loss(
    image_emb: Float[Array, "b d"],
    text_emb: Float[Array, "b d"],
    logit_scale: ArrayLike,
    scalars: Scalars,
    *,
    objective: Objective,
    axis_name: AxisName,
    pair_ids: Integer[Array, "b k"] | None = None,
    row_weights: Float[Array, " b"] | None = None,
    tile: int | None = None,
) -> tuple[Float[Array, ""], PairStatistics]:
    """Sums the losses of the local rows in both directions.

    Args:
        image_emb, text_emb: local rows; at least two pairs in the global batch.
        logit_scale: after exp.
        scalars: of the objective.
        objective: the loss of one row.
        axis_name: mesh axes that the batch is split over, or None.
        pair_ids: equal pairs have equal ids in all columns. Required unless
            `objective.equal_pairs` is "negative".
        row_weights: constant weights of the losses of the rows, in both directions.
        tile: upper bound of the side of a tile; None is the default of `Ring.create`.

    Returns:
        The sum on this device, at least float32, and statistics without gradients.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    dtype = jnp.promote_types(image_emb.dtype, jnp.float32)
    ring = Ring.create(objective, axes, jax.ShapeDtypeStruct(image_emb.shape, dtype), tile)
    as_array = functools.partial(jnp.asarray, dtype=dtype)
    scale, scalars = as_array(logit_scale), tuple(map(as_array, scalars))
    arguments = (image_emb, text_emb, scale, scalars, pair_ids, row_weights)
    # All arguments of the custom rule are marked as varying. JAX then sums the gradients of
    # replicated ones outside of the rule.
    varying = frozenset().union(*map(varying_axes, jax.tree.leaves(arguments)))
    loss, statistics = _ring_loss(ring, *jax.tree.map(functools.partial(vary, varying), arguments))
    return loss, jax.lax.stop_gradient(statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_loss(ring: Ring, *arguments: Any) -> tuple[jax.Array, PairStatistics]:
    return _forward(ring, *arguments)[0]


def _forward(ring, image_emb, text_emb, scale, scalars, pair_ids, row_weights):
    objective = ring.objective
    (images, image_ids), own_texts = ring.blocks(image_emb, text_emb, pair_ids)
    no_positives = zeros(own_texts[0].shape[:2], scale)
    no_texts = _no_statistics(objective, no_positives)
    no_images = _no_statistics(objective, zeros(images.shape[:2], scale))

    def add_block(rounds, block, _, stays):
        texts, text_ids = block

        def one_tile(i, j, carry):
            text_statistics, (image_statistics, positives) = carry
            logits = scale * inner_products(at(images, i), at(texts, j))
            masks = ring.masks(rounds, i, j, at(image_ids, i), at(text_ids, j))
            add = functools.partial(
                _add_tile, objective, logits=logits, masks=masks, scalars=scalars
            )
            image_tile = add(at(image_statistics, i), axis=1)
            text_tile = add(at(text_statistics, j), axis=0)
            positive = at(positives, j) + jnp.sum(logits, axis=0, where=masks.is_positive)
            return (
                put(text_statistics, text_tile, j),
                (put(image_statistics, image_tile, i), put(positives, positive, j)),
            )

        return ring.for_each_tile(one_tile, (no_texts, stays))

    text_statistics, (image_statistics, positives) = ring.tour(
        add_block,
        own_texts,
        sums=no_texts,
        stays=(no_images, no_positives),
        merge=lambda before, part: _merge(objective, before, part, scalars),
    )
    text_statistics, positives = jax.tree.map(ring.texts.join, (text_statistics, positives))
    image_statistics = jax.tree.map(ring.images.join, image_statistics)
    if ring.group > 1:
        parts = ring.exchange_rows(image_statistics)
        image_statistics = functools.reduce(
            lambda one, other: _merge(objective, one, other, scalars),
            [at(parts, member) for member in range(ring.group)],
        )
    num_pairs = ring.num_rounds * ring.images.num_rows
    finish = functools.partial(
        objective.finish, positives=positives, scalars=scalars, num_pairs=num_pairs
    )
    image_losses, image_slopes = finish(image_statistics)
    text_losses, text_slopes = finish(text_statistics)
    if row_weights is not None:
        image_losses, text_losses = row_weights * image_losses, row_weights * text_losses
    loss = jnp.sum(image_losses) + jnp.sum(text_losses)
    statistics = _pair_statistics(positives, image_statistics, text_statistics, scale)
    arguments = (image_emb, text_emb, scale, scalars, pair_ids, row_weights)
    return (loss, statistics), (*arguments, image_slopes, text_slopes)


def _backward(ring, residuals, cotangents):
    image_emb, text_emb, scale, scalars, pair_ids, row_weights, *slopes = residuals
    loss_grad, _ = cotangents
    objective = ring.objective
    (images, image_ids), own_texts = ring.blocks(image_emb, text_emb, pair_ids)
    # The derivatives are multiplied by the cotangent of the device that a row belongs to.
    factor = loss_grad if row_weights is None else loss_grad * row_weights
    image_slopes, text_slopes = _scaled(slopes[0], factor), _scaled(slopes[1], factor)
    nothing: Any = ()  # for values that tiles do not read
    of_partners = [s._replace(scalars=(), positive=nothing) for s in (image_slopes, text_slopes)]
    image_tiles = jax.tree.map(ring.images.split, ring.gather_rows(of_partners[0]))
    text_tiles = jax.tree.map(ring.texts.split, of_partners[1])
    no_images, no_texts = zeros(images.shape, scale), zeros(own_texts[0].shape, scale)
    no_scalars = (zeros((), scale),) * len(objective.second_pass)

    def add_block(rounds, block, text_slopes, stays):
        texts, text_ids = block

        def one_tile(i, j, carry):
            text_grads, (image_grads, scalar_grads) = carry
            image_tile, text_tile = at(images, i), at(texts, j)
            logits = scale * inner_products(image_tile, text_tile)
            masks = ring.masks(rounds, i, j, at(image_ids, i), at(text_ids, j))
            grad, by_scalars = _tile_slopes(
                objective, logits, masks, at(image_tiles, i), at(text_slopes, j), scalars
            )
            image_grad = at(image_grads, i) + product(grad, text_tile, 1)
            text_grad = at(text_grads, j) + product(grad, image_tile, 0)
            scalar_grads = jax.tree.map(
                lambda total, part: total + jnp.sum(part), scalar_grads, by_scalars
            )
            return (put(text_grads, text_grad, j), (put(image_grads, image_grad, i), scalar_grads))

        return ring.for_each_tile(one_tile, (no_texts, stays))

    text_grads, (image_grads, second_pass) = ring.tour(
        add_block, own_texts, rows=text_tiles, sums=no_texts, stays=(no_images, no_scalars)
    )
    positive_slopes = (image_slopes.positive + text_slopes.positive)[:, None]
    image_grads = ring.sum_of_members(ring.images.join(image_grads)) + positive_slopes * text_emb
    text_grads = ring.texts.join(text_grads) + positive_slopes * image_emb
    scalar_grads = [
        jnp.sum(by_image) + jnp.sum(by_text)
        for by_image, by_text in zip(image_slopes.scalars, text_slopes.scalars, strict=True)
    ]
    for index, total in zip(objective.second_pass, second_pass, strict=True):
        scalar_grads[index] += total
    return (
        (scale * image_grads).astype(image_emb.dtype),
        (scale * text_grads).astype(text_emb.dtype),
        # sum_ij G_ij <image_i, text_j>, from the gradient of the images.
        jnp.sum(image_emb * image_grads),
        tuple(scalar_grads),
        None,
        None,
    )


_ring_loss.defvjp(_forward, _backward)


def _scaled(slopes: RowSlopes, factor: jax.Array) -> RowSlopes:
    """Returns the slopes of a loss multiplied by a factor."""
    scaled = jax.tree.map(lambda slope: slope * factor, slopes._replace(offsets=()))
    return scaled._replace(offsets=slopes.offsets)


def _tile_slopes(
    objective: Objective,
    logits: Tile,
    masks: Masks,
    image_slopes: RowSlopes,
    text_slopes: RowSlopes,
    scalars: Scalars,
) -> tuple[Tile, tuple[Tile, ...]]:
    """Sums both directions' derivatives by a tile of logits, and by the `second_pass` scalars."""

    def add_part(slope: Callable, is_part: jax.Array, others: Any) -> Any:
        images = slope(logits, image_slopes, 1, scalars)
        texts = slope(logits, text_slopes, 0, scalars)
        return jax.tree.map(lambda a, b, c: jnp.where(is_part, a + b, c), images, texts, others)

    nothing = (0, (0,) * len(objective.second_pass))
    slopes = add_part(objective.negative_slope, masks.is_negative, nothing)
    if objective.equal_pairs == "positive" and masks.is_equal is not None:
        slopes = add_part(objective.equal_slope, masks.is_equal, slopes)
    return slopes


def _no_statistics(objective: Objective, nothing: jax.Array) -> RowStatistics:
    """Returns the statistics of no tiles; `nothing` is zeros of the rows' shape and dtype."""
    # The lowest finite number instead of -inf, whose difference with itself is NaN.
    lowest = nothing + jnp.finfo(nothing.dtype).min
    statistics = RowStatistics(lowest, nothing, (nothing,) * objective.num_sums)
    if objective.equal_pairs == "negative":
        return statistics
    equal = None
    if objective.equal_pairs == "positive":
        equal = RowStatistics(lowest, nothing, (nothing,) * objective.num_equal_sums)
    return statistics._replace(num_negatives=nothing, equal=equal)


def _add_tile(
    objective: Objective,
    statistics: RowStatistics,
    logits: Tile,
    masks: Masks,
    axis: int,
    scalars: Scalars,
) -> RowStatistics:
    """Adds one tile to the statistics; sums over its `axis`, 1 for rows and 0 for columns."""
    add = functools.partial(_add_part, logits=logits, axis=axis, scalars=scalars)
    num_negatives, equal = statistics.num_negatives, statistics.equal
    found = add(objective.accumulate, statistics, is_part=masks.is_negative)
    if num_negatives is not None:
        num_negatives = num_negatives + jnp.sum(masks.is_negative, axis).astype(logits.dtype)
    if equal is not None and masks.is_equal is not None:
        equal = add(objective.accumulate_equal, equal, is_part=masks.is_equal)
    return found._replace(num_negatives=num_negatives, equal=equal)


def _merge(
    objective: Objective, one: RowStatistics, other: RowStatistics, scalars: Scalars
) -> RowStatistics:
    """Merges the statistics of two disjoint sets of columns (or rows)."""
    found = _merge_part(objective.accumulate, one, other, scalars)
    num_negatives = equal = None
    if one.num_negatives is not None and other.num_negatives is not None:
        num_negatives = one.num_negatives + other.num_negatives
    if one.equal is not None and other.equal is not None:
        equal = _merge_part(objective.accumulate_equal, one.equal, other.equal, scalars)
    return found._replace(num_negatives=num_negatives, equal=equal)


def _pair_statistics(
    positives: Rows, images: RowStatistics, texts: RowStatistics, scale: jax.Array
) -> PairStatistics:
    """Converts statistics of logits to cosine similarities, which are 0 for a scale of 0."""
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return PairStatistics(
        positive=positives * inverse,
        image_hardest=images.highest * inverse,
        image_ties=images.ties,
        text_hardest=texts.highest * inverse,
        text_ties=texts.ties,
        num_negatives=images.num_negatives,
    )


def _add_part(
    accumulate: _Accumulate,
    statistics: RowStatistics,
    logits: Tile,
    is_part: TileMask,
    axis: int,
    scalars: Scalars,
) -> RowStatistics:
    """Adds the logits of a tile for which `is_part` is true."""
    lowest = jnp.finfo(logits.dtype).min
    highest = jnp.maximum(statistics.highest, jnp.max(jnp.where(is_part, logits, lowest), axis))
    reached = is_part & (logits == jnp.expand_dims(highest, axis))
    ties = jnp.where(statistics.highest == highest, statistics.ties, 0)
    ties = ties + jnp.sum(reached, axis).astype(logits.dtype)
    sums = accumulate(statistics, highest, logits, is_part, axis, scalars)
    return RowStatistics(highest, ties, sums)


def _merge_part(
    accumulate: _Accumulate, one: RowStatistics, other: RowStatistics, scalars: Scalars
) -> RowStatistics:
    highest = jnp.maximum(one.highest, other.highest)
    no_logits = zeros((*highest.shape, 0), highest)

    def sums_relative_to_highest(statistics: RowStatistics) -> tuple[jax.Array, ...]:
        # Adding an empty tile only changes the reference of the sums.
        return accumulate(statistics, highest, no_logits, no_logits > 0, -1, scalars)

    own, others = (jnp.where(part.highest == highest, part.ties, 0) for part in (one, other))
    sums = (sums_relative_to_highest(part) for part in (one, other))
    return RowStatistics(highest, own + others, jax.tree.map(jnp.add, *sums))
