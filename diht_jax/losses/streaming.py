"""The streaming forms of the losses: memory O(b d + tile^2) per device, exact on any mesh.

Images stay where they are; blocks of texts travel round the ring of devices, their column
statistics with them. Each block of logits is made once in the forward pass and serves both
directions; the backward pass makes it once more and sends the texts' gradients round with them.
No device ever holds a [b, N] or an [N, d] array. Inside a block, tiles bound the memory.

Where the images of a few neighbours are small, these gather them first and the texts travel from
group to group (`ring.py`): fewer rounds, each with more products. A member then has the rows of
its whole group, over the texts that it has met; statistics and gradients of the images are merged
inside the group after the last round.

All that travels is sent before the products of a round: the next block of texts, and what the
devices before have summed for the block at hand, to which this device adds its part afterwards.
So every transfer has the products of a whole round to hide behind. The row statistics (and the
slopes, in the backward pass) travel as one array, since a ring of many devices is bound by the
number of its transfers and not by their bytes.

What is summed is the objective's own (`objective.py`); this file knows none of them.

Source: ring attention's communication (arXiv 2310.01889) and the online log-sum-exp of Milakov
and Gimelshein (arXiv 1805.02867), applied to both directions of DiHT's loss at once. Ours.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diht_jax.losses.dense import AxisName, inner_products
from diht_jax.losses.objective import (
    Objective,
    PairStatistics,
    RowSlopes,
    RowStatistics,
    Scalars,
)
from diht_jax.losses.ring import Ring
from diht_jax.losses.tiles import at, product, put, varying_axes, varying_over, zeros


def streaming_loss(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array,
    scalars: Scalars,
    *,
    objective: Objective,
    axis_name: AxisName,
    tile: int | None = None,
) -> tuple[jax.Array, PairStatistics]:
    """The losses of the local rows in both directions, summed.

    Args:
        image_emb, text_emb: float [b, d], local rows; at least two pairs in the global batch.
        logit_scale: scalar.
        scalars: of the objective.
        objective: the loss, one row of it.
        axis_name: mesh axes that the batch is split over, or None.
        tile: side of a tile, at most; None for `tile_of_block`.

    Returns:
        A scalar of this device, at least float32, and statistics without gradient.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())
    dtype = jnp.promote_types(image_emb.dtype, jnp.float32)
    ring = Ring.create(objective, axes, jax.ShapeDtypeStruct(image_emb.shape, dtype), tile)
    arguments = (
        image_emb,
        text_emb,
        jnp.asarray(logit_scale, dtype),
        tuple(jnp.asarray(value, dtype) for value in scalars),
    )
    # Every argument differs from device to device as far as the rule below is concerned: JAX
    # then sums the gradients of replicated ones itself, outside of it.
    varying = frozenset().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(arguments)))
    loss, statistics = _ring_loss(ring, *jax.tree.map(varying_over(varying), arguments))
    return loss, jax.lax.stop_gradient(statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_loss(
    ring: Ring,
    image_emb: jax.Array,
    text_emb: jax.Array,
    scale: jax.Array,
    scalars: tuple[jax.Array, ...],
) -> tuple[jax.Array, PairStatistics]:
    return _forward(ring, image_emb, text_emb, scale, scalars)[0]


def _forward(ring, image_emb, text_emb, scale, scalars):
    objective = ring.objective
    images, texts = ring.images.split(ring.gather(image_emb)), ring.texts.split(text_emb)
    no_positives = zeros(texts.shape[:2], scale)
    no_texts = _no_statistics(objective, no_positives)
    no_images = _no_statistics(objective, zeros(images.shape[:2], scale))

    def add_block(rounds, texts, _, stays):
        def add_tile(i, j, carry):
            text_statistics, (image_statistics, positives) = carry
            logits = scale * inner_products(at(images, i), at(texts, j))
            is_positive, is_negative = ring.masks(rounds, i, j)
            add = functools.partial(
                _accumulate,
                objective,
                logits=logits,
                is_negative=is_negative,
                scalars=scalars,
            )
            image_tile = add(at(image_statistics, i), axis=1)
            text_tile = add(at(text_statistics, j), axis=0)
            positive = at(positives, j) + jnp.sum(logits, axis=0, where=is_positive)
            return (
                put(text_statistics, text_tile, j),
                (put(image_statistics, image_tile, i), put(positives, positive, j)),
            )

        return ring.for_each_tile(add_tile, (no_texts, stays))

    text_statistics, (image_statistics, positives) = ring.tour(
        add_block,
        texts,
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
    finish = functools.partial(
        objective.finish, positives=positives, scalars=scalars, num_pairs=ring.num_pairs
    )
    image_losses, image_slopes = finish(image_statistics)
    text_losses, text_slopes = finish(text_statistics)
    loss = jnp.sum(image_losses) + jnp.sum(text_losses)
    statistics = _pair_statistics(positives, image_statistics, text_statistics, scale)
    residuals = (image_emb, text_emb, scale, scalars, image_slopes, text_slopes)
    return (loss, statistics), residuals


def _backward(ring, residuals, cotangents):
    image_emb, text_emb, scale, scalars, image_slopes, text_slopes = residuals
    loss_grad, _ = cotangents
    objective = ring.objective
    images, texts = ring.images.split(ring.gather(image_emb)), ring.texts.split(text_emb)
    # The derivatives scale with the cotangent of the device that a row belongs to.
    image_slopes, text_slopes = (
        _scaled(slopes, loss_grad) for slopes in (image_slopes, text_slopes)
    )
    of_negatives = [s._replace(scalars=(), positive=()) for s in (image_slopes, text_slopes)]
    image_tiles = jax.tree.map(ring.images.split, ring.gather_rows(of_negatives[0]))
    text_tiles = jax.tree.map(ring.texts.split, of_negatives[1])
    image_zeros, text_zeros = (zeros(tiles.shape, scale) for tiles in (images, texts))

    def add_block(rounds, texts, text_slopes, stays):
        def add_tile(i, j, carry):
            text_grads, (image_grads, scalar_grads) = carry
            image_tile, text_tile = at(images, i), at(texts, j)
            logits = scale * inner_products(image_tile, text_tile)
            _, is_negative = ring.masks(rounds, i, j)
            grad, by_scalars = (
                jax.tree.map(lambda a, b: jnp.where(is_negative, a + b, 0), *directions)
                for directions in zip(
                    objective.negative_slope(logits, at(image_tiles, i), 1, scalars),
                    objective.negative_slope(logits, at(text_slopes, j), 0, scalars),
                    strict=True,
                )
            )
            image_grad = at(image_grads, i) + product(grad, text_tile, 1)
            text_grad = at(text_grads, j) + product(grad, image_tile, 0)
            scalar_grads = jax.tree.map(
                lambda total, part: total + jnp.sum(part), scalar_grads, by_scalars
            )
            return (
                put(text_grads, text_grad, j),
                (put(image_grads, image_grad, i), scalar_grads),
            )

        return ring.for_each_tile(add_tile, (text_zeros, stays))

    scalar_zeros = tuple(zeros((), scale) for _ in objective.second_pass)
    text_grads, (image_grads, second_pass) = ring.tour(
        add_block, texts, rows=text_tiles, sums=text_zeros, stays=(image_zeros, scalar_zeros)
    )
    positive_slopes = (image_slopes.positive + text_slopes.positive)[:, None]
    image_grads = ring.sum_of_members(ring.images.join(image_grads)) + positive_slopes * text_emb
    text_grads = ring.texts.join(text_grads) + positive_slopes * image_emb
    # sum_ij G_ij <image_i, text_j>, which the gradient of the images holds already.
    scale_grad = jnp.sum(image_emb * image_grads)
    return (
        (scale * image_grads).astype(image_emb.dtype),
        (scale * text_grads).astype(text_emb.dtype),
        scale_grad,
        _scalar_grads(objective, image_slopes, text_slopes, second_pass),
    )


def _scalar_grads(
    objective: Objective,
    image_slopes: RowSlopes,
    text_slopes: RowSlopes,
    second_pass: tuple[jax.Array, ...],
) -> tuple[jax.Array, ...]:
    grads = [
        jnp.sum(by_image) + jnp.sum(by_text)
        for by_image, by_text in zip(image_slopes.scalars, text_slopes.scalars, strict=True)
    ]
    for index, total in zip(objective.second_pass, second_pass, strict=True):
        grads[index] += total
    return tuple(grads)


_ring_loss.defvjp(_forward, _backward)


def _no_statistics(objective: Objective, zeros: jax.Array) -> RowStatistics:
    # The lowest finite number, not -inf: differences of two of them must not be NaN.
    lowest = zeros + jnp.finfo(zeros.dtype).min
    return RowStatistics(lowest, zeros, (zeros,) * objective.num_sums)


def _accumulate(
    objective: Objective,
    statistics: RowStatistics,
    logits: jax.Array,
    is_negative: jax.Array,
    axis: int,
    scalars: Scalars,
) -> RowStatistics:
    """Adds the negatives of a tile; `axis` is that of the tile which is summed over."""
    lowest = jnp.finfo(logits.dtype).min
    highest = jnp.maximum(statistics.highest, jnp.max(jnp.where(is_negative, logits, lowest), axis))
    reached = is_negative & (logits == jnp.expand_dims(highest, axis))
    ties = jnp.where(statistics.highest == highest, statistics.ties, 0)
    ties = ties + jnp.sum(reached, axis).astype(logits.dtype)
    sums = objective.accumulate(statistics, highest, logits, is_negative, axis, scalars)
    return RowStatistics(highest, ties, sums)


def _merge(
    objective: Objective, one: RowStatistics, other: RowStatistics, scalars: Scalars
) -> RowStatistics:
    """The statistics of two disjoint sets of negatives, of both together."""
    highest = jnp.maximum(one.highest, other.highest)
    no_logits = zeros((*highest.shape, 0), highest)

    def sums_relative_to_highest(statistics: RowStatistics) -> tuple[jax.Array, ...]:
        # Another tile that is empty: the sums stay, but for what they are relative to.
        return objective.accumulate(statistics, highest, no_logits, no_logits > 0, -1, scalars)

    ties = sum(jnp.where(part.highest == highest, part.ties, 0) for part in (one, other))
    sums = (sums_relative_to_highest(part) for part in (one, other))
    return RowStatistics(highest, ties, jax.tree.map(jnp.add, *sums))


def _pair_statistics(
    positives: jax.Array, images: RowStatistics, texts: RowStatistics, scale: jax.Array
) -> PairStatistics:
    """As cosines; with a scale of 0 all logits are 0, and so are these."""
    inverse = jnp.where(scale > 0, 1 / jnp.where(scale > 0, scale, 1), 0)
    return PairStatistics(
        positive=positives * inverse,
        image_hardest=images.highest * inverse,
        image_ties=images.ties,
        text_hardest=texts.highest * inverse,
        text_ties=texts.ties,
    )


def _scaled(slopes: RowSlopes, factor: jax.Array) -> RowSlopes:
    return RowSlopes(
        slopes.positive * factor,
        slopes.negative * factor,
        slopes.offsets,
        tuple(slope * factor for slope in slopes.scalars),
    )
