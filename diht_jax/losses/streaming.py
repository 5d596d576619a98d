"""The streaming forms of the losses: memory O(b d + tile^2) per device, exact on any mesh.

Images stay where they are; blocks of texts travel round the ring of devices, their column
statistics with them. Each block of logits is made once in the forward pass and serves both
directions; the backward pass makes it once more and sends the texts' gradients round with them.
No device ever holds a [b, N] or an [N, d] array. Inside a block, square tiles bound the memory.

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

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

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

# Sides of tiles, at most; every device launches a few kernels for each tile.
TILES = (2048, 1024, 512)


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
    axes = _in_mesh_order((axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ()))
    dtype = jnp.promote_types(image_emb.dtype, jnp.float32)
    num_tiles = math.ceil(image_emb.shape[0] / (tile or tile_of_block(*image_emb.shape)))
    ring = _Ring(
        objective,
        axes,
        num_devices=math.prod(jax.lax.axis_size(axis) for axis in axes),
        num_rows=image_emb.shape[0],
        num_tiles=num_tiles,
        # Tiles of equal size waste less on padding than full ones and a remainder.
        tile=math.ceil(image_emb.shape[0] / num_tiles),
    )
    arguments = (
        image_emb,
        text_emb,
        jnp.asarray(logit_scale, dtype),
        tuple(jnp.asarray(value, dtype) for value in scalars),
    )
    # Every argument differs from device to device as far as the rule below is concerned: JAX
    # then sums the gradients of replicated ones itself, outside of it.
    varying = frozenset().union(*(_varying_axes(leaf) for leaf in jax.tree.leaves(arguments)))
    loss, statistics = _ring_loss(ring, *jax.tree.map(_varying_over(varying), arguments))
    return loss, jax.lax.stop_gradient(statistics)


def tile_of_block(num_rows: int, width: int) -> int:
    """The largest side of `TILES` whose logits take no more memory than the block [b, d]."""
    return next((tile for tile in TILES if tile**2 <= num_rows * width), TILES[-1])


def _in_mesh_order(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Any ring visits all blocks; `ppermute` of newer JAX wants its axes in the mesh's order."""
    names = jax.sharding.get_abstract_mesh().axis_names
    return tuple(sorted(axes, key=names.index)) if set(axes) <= set(names) else axes


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Sizes, known when the step is traced; row arrays lie as [num_tiles, tile, ...], padded."""

    objective: Objective
    axes: tuple[str, ...]
    num_devices: int
    num_rows: int
    num_tiles: int
    tile: int

    @property
    def num_pairs(self) -> int:
        return self.num_devices * self.num_rows

    def shift(self, block: jax.Array) -> jax.Array:
        """Hands `block` to the next device, and takes that of the one before."""
        if self.num_devices == 1:
            return block
        to_next = [(i, (i + 1) % self.num_devices) for i in range(self.num_devices)]
        return jax.lax.ppermute(block, self.axes, to_next)

    def shift_rows(self, rows: Any) -> Any:
        """`shift` of a tree of arrays of one shape, as one array."""
        leaves, structure = jax.tree.flatten(rows)
        if self.num_devices == 1 or not leaves:
            return rows
        return jax.tree.unflatten(structure, list(self.shift(jnp.stack(leaves))))

    def split(self, rows: jax.Array) -> jax.Array:
        """[num_rows, ...] -> [num_tiles, tile, ...], zeros at the end."""
        missing = self.num_tiles * self.tile - self.num_rows
        if missing:
            rows = jnp.pad(rows, [(0, missing)] + [(0, 0)] * (rows.ndim - 1))
        return rows.reshape(self.num_tiles, self.tile, *rows.shape[1:])

    def join(self, tiles: jax.Array) -> jax.Array:
        """The inverse of `split`."""
        return tiles.reshape(-1, *tiles.shape[2:])[: self.num_rows]

    def masks(self, rounds: jax.Array, row_tile: jax.Array, column_tile: jax.Array):
        """bool [tile, tile]: which logits are positives, and which are negatives."""
        rows = row_tile * self.tile + jnp.arange(self.tile)[:, None]
        columns = column_tile * self.tile + jnp.arange(self.tile)[None, :]
        is_positive = (rounds == 0) & (rows == columns)
        is_negative = ~is_positive
        if self.num_tiles * self.tile > self.num_rows:
            is_negative &= (rows < self.num_rows) & (columns < self.num_rows)
        return is_positive, is_negative

    def for_each_tile(self, body: Callable, carry: Any) -> Any:
        """Runs `body(row_tile, column_tile, carry) -> carry` on all tiles of a block."""
        if self.num_tiles == 1:
            return body(0, 0, carry)

        def step(index, carry):
            return body(index // self.num_tiles, index % self.num_tiles, carry)

        return jax.lax.fori_loop(0, self.num_tiles**2, step, carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_loss(
    ring: _Ring,
    image_emb: jax.Array,
    text_emb: jax.Array,
    scale: jax.Array,
    scalars: tuple[jax.Array, ...],
) -> tuple[jax.Array, PairStatistics]:
    return _forward(ring, image_emb, text_emb, scale, scalars)[0]


def _forward(ring, image_emb, text_emb, scale, scalars):
    objective = ring.objective
    images, texts = ring.split(image_emb), ring.split(text_emb)
    zeros = _zeros(images.shape[:2], scale)
    # The lowest finite number, not -inf: differences of two of them must not be NaN.
    nothing = RowStatistics(
        zeros + jnp.finfo(zeros.dtype).min, zeros, (zeros,) * objective.num_sums
    )

    def one_round(rounds, carry):
        texts, text_statistics, image_statistics, positives = carry
        next_texts = ring.shift(texts)
        # Those of the block at hand, from the device that had it before.
        text_statistics = ring.shift_rows(text_statistics)

        def add_tile(i, j, carry):
            text_statistics, image_statistics, positives = carry
            logits = scale * inner_products(_at(images, i), _at(texts, j))
            is_positive, is_negative = ring.masks(rounds, i, j)
            add = functools.partial(
                _accumulate,
                objective,
                logits=logits,
                is_negative=is_negative,
                scalars=scalars,
            )
            image_tile = add(_at(image_statistics, i), axis=1)
            text_tile = add(_at(text_statistics, j), axis=0)
            positive = _at(positives, i) + jnp.sum(logits, axis=1, where=is_positive)
            return (
                _put(text_statistics, text_tile, j),
                _put(image_statistics, image_tile, i),
                _put(positives, positive, i),
            )

        part, image_statistics, positives = ring.for_each_tile(
            add_tile, (nothing, image_statistics, positives)
        )
        if ring.num_devices > 1:
            part = _merge(objective, text_statistics, part, scalars)
        return next_texts, part, image_statistics, positives

    _, text_statistics, image_statistics, positives = jax.lax.fori_loop(
        0, ring.num_devices, one_round, (texts, nothing, nothing, zeros)
    )
    # The last block of a device is that of the next one.
    text_statistics = ring.shift_rows(text_statistics)
    text_statistics, image_statistics, positives = jax.tree.map(
        ring.join, (text_statistics, image_statistics, positives)
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
    images, texts = ring.split(image_emb), ring.split(text_emb)
    # The derivatives scale with the cotangent of the device that a row belongs to.
    image_slopes, text_slopes = (
        _scaled(slopes, loss_grad) for slopes in (image_slopes, text_slopes)
    )
    image_tiles, text_tiles = (
        jax.tree.map(ring.split, slopes._replace(scalars=(), positive=()))
        for slopes in (image_slopes, text_slopes)
    )
    emb_zeros = _zeros(images.shape, scale)

    def one_round(rounds, carry):
        texts, text_slopes, text_grads, image_grads, scalar_grads = carry
        next_texts, next_slopes = ring.shift(texts), ring.shift_rows(text_slopes)
        text_grads = ring.shift(text_grads)

        def add_tile(i, j, carry):
            text_grads, image_grads, scalar_grads = carry
            image_tile, text_tile = _at(images, i), _at(texts, j)
            logits = scale * inner_products(image_tile, text_tile)
            _, is_negative = ring.masks(rounds, i, j)
            grad, by_scalars = (
                jax.tree.map(lambda a, b: jnp.where(is_negative, a + b, 0), *directions)
                for directions in zip(
                    objective.negative_slope(logits, _at(image_tiles, i), 1, scalars),
                    objective.negative_slope(logits, _at(text_slopes, j), 0, scalars),
                    strict=True,
                )
            )
            image_grad = _at(image_grads, i) + _product(grad, text_tile, 1)
            text_grad = _at(text_grads, j) + _product(grad, image_tile, 0)
            scalar_grads = jax.tree.map(
                lambda total, part: total + jnp.sum(part), scalar_grads, by_scalars
            )
            return (
                _put(text_grads, text_grad, j),
                _put(image_grads, image_grad, i),
                scalar_grads,
            )

        part, image_grads, scalar_grads = ring.for_each_tile(
            add_tile, (emb_zeros, image_grads, scalar_grads)
        )
        if ring.num_devices > 1:
            # The barrier keeps the compiler from adding within a product, which would then wait
            # for what arrives.
            part = text_grads + jax.lax.optimization_barrier(part)
        return next_texts, next_slopes, part, image_grads, scalar_grads

    scalar_zeros = tuple(_zeros((), scale) for _ in objective.second_pass)
    _, _, text_grads, image_grads, second_pass = jax.lax.fori_loop(
        0,
        ring.num_devices,
        one_round,
        (texts, text_tiles, emb_zeros, emb_zeros, scalar_zeros),
    )
    text_grads = ring.shift(text_grads)
    positive_slopes = (image_slopes.positive + text_slopes.positive)[:, None]
    image_grads = ring.join(image_grads) + positive_slopes * text_emb
    text_grads = ring.join(text_grads) + positive_slopes * image_emb
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
    no_logits = _zeros((*highest.shape, 0), highest)

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


def _product(grad: jax.Array, emb: jax.Array, axis: int) -> jax.Array:
    """[t, u] x [u, d] summed over u for axis 1; x [t, d] summed over t for axis 0."""
    return jax.lax.dot_general(
        grad,
        emb.astype(grad.dtype),
        (((axis,), (0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )


def _zeros(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Of the dtype of `like`, and varying over the mesh as it does."""
    return _varying_over(_varying_axes(like))(jnp.zeros(shape, like.dtype))


def _varying_over(axes: frozenset[str]) -> Callable[[jax.Array], jax.Array]:
    def cast(x: jax.Array) -> jax.Array:
        missing = tuple(axes - _varying_axes(x))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return cast


def _varying_axes(x: jax.Array) -> frozenset[str]:
    """Mesh axes over which `x` differs from device to device; empty without check_vma."""
    return jax.typeof(x).manual_axis_type.varying


def _at(tree: Any, index: jax.Array | int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(tree: Any, part: Any, index: jax.Array | int) -> Any:
    return jax.tree.map(
        lambda x, p: jax.lax.dynamic_update_index_in_dim(x, p, index, 0), tree, part
    )
