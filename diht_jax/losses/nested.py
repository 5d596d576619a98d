"""The losses of several sizes of the embeddings at once: of their first 64, 128, ... numbers.

A size counts as an embedding of its own, made to unit length again; the last size is the whole
embedding, as it is. In the streaming form one ring serves all sizes: the texts travel once, and a
tile's products of one size go on from those of the size before, so that all sizes together take as
many products and transfers as the whole embeddings alone. Every size has statistics of its own,
which travel as one array as those of one size do.

With `r` the inverse lengths of the first m numbers, `s_ij = scale r_i r_j <x_i, y_j>` over these
numbers, so what a size adds to the gradient of x_i is `sum_j G_ij scale r_i r_j y_j`, which joins
that of larger sizes before the product, less `r_i^2 x_i sum_j G_ij s_ij` for the change of length.

Source: Matryoshka representations (arXiv 2205.13147); the computation is ours.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from diht_jax.losses.dense import AxisName, dense_loss, inner_products
from diht_jax.losses.objective import Objective, PairStatistics, Scalars
from diht_jax.losses.ring import Ring
from diht_jax.losses.row_statistics import add_tile, merge, no_statistics, pair_statistics
from diht_jax.losses.streaming import (
    ring_and_arguments,
    scalar_grads,
    scaled,
    tile_slopes,
    with_weighted_sums,
)
from diht_jax.losses.tiles import at, product, put, zeros

Sizes = tuple[int, ...]


def gathered_losses(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array,
    scalars: Scalars,
    *,
    objective: Objective,
    axis_name: AxisName,
    sizes: Sizes,
    pair_ids: jax.Array | None = None,
    row_weights: jax.Array | None = None,
) -> tuple[jax.Array, PairStatistics]:
    """As `streaming_losses`, one size after the other, each gathered by `dense_loss`."""
    losses = []
    for size in sizes:
        loss, statistics = dense_loss(
            first_numbers(image_emb, size),
            first_numbers(text_emb, size),
            logit_scale,
            scalars,
            objective=objective,
            axis_name=axis_name,
            pair_ids=pair_ids,
            row_weights=row_weights,
        )
        losses.append(loss)
    return jnp.stack(losses), statistics


def first_numbers(emb: jax.Array, size: int) -> jax.Array:
    """[b, d] -> [b, size], the first numbers at unit length; the whole embedding as it is."""
    if size == emb.shape[1]:
        return emb
    return (emb[:, :size] * _inverse_lengths(emb, size)[:, None]).astype(emb.dtype)


def streaming_losses(
    image_emb: jax.Array,
    text_emb: jax.Array,
    logit_scale: jax.Array,
    scalars: Scalars,
    *,
    objective: Objective,
    axis_name: AxisName,
    sizes: Sizes,
    pair_ids: jax.Array | None = None,
    row_weights: jax.Array | None = None,
    tile: int | None = None,
) -> tuple[jax.Array, PairStatistics]:
    """The losses [k] of all sizes, each of the local rows in both directions, summed.

    Args:
        image_emb, text_emb, logit_scale, scalars, objective, axis_name, pair_ids, row_weights,
            tile: see `streaming.streaming_loss`; the weights are those of all sizes.
        sizes: rising, the last one that of the embeddings.

    Returns:
        Losses of this device, and statistics of the whole embeddings, without gradient.
    """
    ring, arguments = ring_and_arguments(
        *(image_emb, text_emb, logit_scale, scalars, pair_ids, row_weights),
        objective=objective,
        axis_name=axis_name,
        tile=tile,
    )
    losses, statistics = _ring_losses(ring, sizes, *arguments)
    return losses, jax.lax.stop_gradient(statistics)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _ring_losses(ring, sizes, image_emb, text_emb, scale, scalars, pair_ids, row_weights):
    return _forward(ring, sizes, image_emb, text_emb, scale, scalars, pair_ids, row_weights)[0]


def _forward(ring: Ring, sizes: Sizes, image_emb, text_emb, scale, scalars, pair_ids, row_weights):
    objective = ring.objective
    (images, image_ids), own_texts = ring.blocks(image_emb, text_emb, pair_ids)
    no_positives = [zeros(own_texts[0].shape[:2], scale)] * len(sizes)
    no_texts = [no_statistics(objective, nothing) for nothing in no_positives]
    no_images = [no_statistics(objective, zeros(images.shape[:2], scale))] * len(sizes)

    def logits_of(image_tile, text_tile):
        return [scale * p * r for p, r in _products(image_tile, text_tile, sizes)]

    def add_block(rounds, block, _, stays):
        texts, text_ids = block

        def one_tile(i, j, carry):
            text_statistics, (image_statistics, positives) = carry
            masks = ring.masks(rounds, i, j, at(image_ids, i), at(text_ids, j))
            add = functools.partial(add_tile, objective, masks=masks, scalars=scalars)
            logits = logits_of(at(images, i), at(texts, j))
            image_tiles = [
                add(tile, s, axis=1)
                for tile, s in zip(at(image_statistics, i), logits, strict=True)
            ]
            text_tiles = [
                add(tile, s, axis=0) for tile, s in zip(at(text_statistics, j), logits, strict=True)
            ]
            found = [
                tile + jnp.sum(s, axis=0, where=masks.is_positive)
                for tile, s in zip(at(positives, j), logits, strict=True)
            ]
            return (
                put(text_statistics, text_tiles, j),
                (put(image_statistics, image_tiles, i), put(positives, found, j)),
            )

        return ring.for_each_tile(one_tile, (no_texts, stays))

    def merge_sizes(ones, others):
        pairs = zip(ones, others, strict=True)
        return [merge(objective, one, other, scalars) for one, other in pairs]

    text_statistics, (image_statistics, positives) = ring.tour(
        add_block, own_texts, sums=no_texts, stays=(no_images, no_positives), merge=merge_sizes
    )
    text_statistics, positives = jax.tree.map(ring.texts.join, (text_statistics, positives))
    image_statistics = jax.tree.map(ring.images.join, image_statistics)
    if ring.group > 1:
        parts = ring.exchange_rows(image_statistics)
        members = [at(parts, member) for member in range(ring.group)]
        image_statistics = functools.reduce(merge_sizes, members)
    if objective.num_weighted_sums:
        image_statistics, text_statistics = with_weighted_sums(
            *(ring, (images, image_ids), own_texts, scalars, logits_of),
            *(image_statistics, text_statistics),
        )
    losses, image_slopes, text_slopes = [], [], []
    for positive, image_rows, text_rows in zip(
        positives, image_statistics, text_statistics, strict=True
    ):
        finish = functools.partial(
            objective.finish, positives=positive, scalars=scalars, num_pairs=ring.num_pairs
        )
        (of_images, by_images), (of_texts, by_texts) = finish(image_rows), finish(text_rows)
        if row_weights is not None:
            of_images, of_texts = row_weights * of_images, row_weights * of_texts
        losses.append(jnp.sum(of_images) + jnp.sum(of_texts))
        image_slopes.append(by_images)
        text_slopes.append(by_texts)
    statistics = pair_statistics(positives[-1], image_statistics[-1], text_statistics[-1], scale)
    arguments = (image_emb, text_emb, scale, scalars, pair_ids, row_weights)
    return (jnp.stack(losses), statistics), (*arguments, image_slopes, text_slopes)


def _backward(ring: Ring, sizes: Sizes, residuals, cotangents):
    *arguments, image_slopes, text_slopes = residuals
    image_emb, text_emb, scale, scalars, pair_ids, row_weights = arguments
    objective = ring.objective
    (images, image_ids), own_texts = ring.blocks(image_emb, text_emb, pair_ids)
    image_slopes, text_slopes = (
        [
            scaled(size_slopes, by_loss if row_weights is None else by_loss * row_weights)
            for size_slopes, by_loss in zip(slopes, cotangents[0], strict=True)
        ]
        for slopes in (image_slopes, text_slopes)
    )
    of_partners = [
        [size_slopes._replace(scalars=(), positive=()) for size_slopes in slopes]
        for slopes in (image_slopes, text_slopes)
    ]
    image_tiles = jax.tree.map(ring.images.split, ring.gather_rows(of_partners[0]))
    text_tiles = jax.tree.map(ring.texts.split, of_partners[1])
    # Behind the gradient of a row: of each size but the last, sum_j G_ij s_ij.
    width = image_emb.shape[1] + len(sizes) - 1
    no_images, no_texts = (
        zeros((*tiles.shape[:2], width), scale) for tiles in (images, own_texts[0])
    )

    def add_block(rounds, block, text_slopes, stays):
        texts, text_ids = block

        def one_tile(i, j, carry):
            text_sums, (image_sums, second_pass) = carry
            image_tile, text_tile = at(images, i), at(texts, j)
            masks = ring.masks(rounds, i, j, at(image_ids, i), at(text_ids, j))
            by_images, by_texts, totals = [], [], []
            by_products = 0
            products = _products(image_tile, text_tile, sizes)
            # From the whole embeddings down: a number counts in its own size and all larger ones.
            for k in reversed(range(len(sizes))):
                logits = scale * products[k][0] * products[k][1]
                grad, by_scalars = tile_slopes(
                    objective, logits, masks, at(image_tiles, i)[k], at(text_slopes, j)[k], scalars
                )
                by_products = by_products + grad * products[k][1]
                numbers = slice(sizes[k - 1] if k else 0, sizes[k])
                by_images.insert(0, product(by_products, text_tile[:, numbers], 1))
                by_texts.insert(0, product(by_products, image_tile[:, numbers], 0))
                if k < len(sizes) - 1:
                    by_images.append(jnp.sum(grad * logits, axis=1)[:, None])
                    by_texts.append(jnp.sum(grad * logits, axis=0)[:, None])
                totals.insert(0, tuple(jnp.sum(part) for part in by_scalars))
            return (
                put(text_sums, at(text_sums, j) + jnp.concatenate(by_texts, axis=1), j),
                (
                    put(image_sums, at(image_sums, i) + jnp.concatenate(by_images, axis=1), i),
                    jax.tree.map(jnp.add, second_pass, totals),
                ),
            )

        return ring.for_each_tile(one_tile, (no_texts, stays))

    nothing = [tuple(zeros((), scale) for _ in objective.second_pass)] * len(sizes)
    text_sums, (image_sums, second_pass) = ring.tour(
        add_block, own_texts, rows=text_tiles, sums=no_texts, stays=(no_images, nothing)
    )
    positive_slopes = [
        a.positive + b.positive for a, b in zip(image_slopes, text_slopes, strict=True)
    ]
    add_own = functools.partial(_add_own, sizes, positive_slopes, scale)
    by_products, image_grads = add_own(
        ring.sum_of_members(ring.images.join(image_sums)), image_emb, text_emb
    )
    _, text_grads = add_own(ring.texts.join(text_sums), text_emb, image_emb)
    of_scalars = [
        scalar_grads(objective, *of_size)
        for of_size in zip(image_slopes, text_slopes, second_pass, strict=True)
    ]
    return (
        image_grads.astype(image_emb.dtype),
        text_grads.astype(text_emb.dtype),
        jnp.sum(image_emb * by_products),
        tuple(map(sum, zip(*of_scalars, strict=True))),
        None,
        None,
    )


_ring_losses.defvjp(_forward, _backward)


def _products(
    rows: jax.Array, columns: jax.Array, sizes: Sizes
) -> list[tuple[jax.Array, jax.Array | float]]:
    """Of each size the inner products, and the inverse lengths of both sides, multiplied."""
    found, total, start = [], 0, 0
    for size in sizes:
        total = total + inner_products(rows[:, start:size], columns[:, start:size])
        inverse = 1.0
        if size < rows.shape[1]:
            inverse = _inverse_lengths(rows, size)[:, None] * _inverse_lengths(columns, size)
        found.append((total, inverse))
        start = size
    return found


def _add_own(
    sizes: Sizes,
    positive_slopes: list[jax.Array],
    scale: jax.Array,
    sums: jax.Array,
    own: jax.Array,
    partners: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the own rows from the sums over their partners, and from the own pairs.

    Returns:
        [b, d]: the sum of the slopes of products times the partners, and the gradient.
    """
    width = own.shape[1]
    by_products, by_lengths = sums[:, :width], jnp.zeros_like(sums[:, :width])
    for k, (size, slope) in enumerate(zip(sizes, positive_slopes, strict=True)):
        numbers = (slice(None), slice(size))
        if size == width:
            by_products = by_products + slope[:, None] * partners
            continue
        inverse = _inverse_lengths(own, size)
        of_product = slope * inverse * _inverse_lengths(partners, size)
        by_products = by_products.at[numbers].add(of_product[:, None] * partners[numbers])
        products = jnp.sum(own[numbers] * partners[numbers], axis=1)
        # The sums came from the largest size down.
        changes = sums[:, width + len(sizes) - 2 - k] + scale * of_product * products
        by_lengths = by_lengths.at[numbers].add((changes * inverse**2)[:, None] * own[numbers])
    return by_products, scale * by_products - by_lengths


def _inverse_lengths(emb: jax.Array, size: int) -> jax.Array:
    """[b, d] -> [b], of the first numbers; finite for zeros, as `models.dual_encoder`."""
    numbers = emb[:, :size].astype(jnp.promote_types(emb.dtype, jnp.float32))
    return jax.lax.rsqrt(jnp.maximum(jnp.sum(numbers**2, axis=1), 1e-24))
