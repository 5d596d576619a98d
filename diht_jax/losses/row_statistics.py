"""Statistics of rows and columns in the streaming form: begun, added to tile by tile, and merged.

All of it is elementwise or a sum over one axis of a tile; no products and no devices here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diht_jax.losses.objective import (
    Masks,
    Objective,
    PairStatistics,
    Rows,
    RowStatistics,
    Scalars,
    Tile,
    TileMask,
)
from diht_jax.losses.ring import zeros

_Accumulate = Callable[..., tuple[jax.Array, ...]]


def no_statistics(objective: Objective, nothing: jax.Array) -> RowStatistics:
    """Statistics of rows without any tile; `nothing` is zeros of their shape and dtype."""
    # The lowest finite number, not -inf: differences of two of them must not be NaN.
    lowest = nothing + jnp.finfo(nothing.dtype).min
    statistics = RowStatistics(lowest, nothing, (nothing,) * objective.num_sums)
    if objective.equal_pairs == "negative":
        return statistics
    equal = None
    if objective.equal_pairs == "positive":
        equal = RowStatistics(lowest, nothing, (nothing,) * objective.num_equal_sums)
    return statistics._replace(num_negatives=nothing, equal=equal)


def add_tile(
    objective: Objective,
    statistics: RowStatistics,
    logits: Tile,
    masks: Masks,
    axis: int,
    scalars: Scalars,
) -> RowStatistics:
    """Adds one more tile to statistics.

    Args:
        objective: the loss of one row.
        statistics: of the tiles before.
        logits, masks: of the tile.
        axis: of the tile, to sum over: 1 for rows, 0 for columns.
        scalars: of the objective.
    """
    add = functools.partial(_add_part, logits=logits, axis=axis, scalars=scalars)
    num_negatives, equal = statistics.num_negatives, statistics.equal
    found = add(objective.accumulate, statistics, is_part=masks.is_negative)
    if num_negatives is not None:
        num_negatives = num_negatives + jnp.sum(masks.is_negative, axis).astype(logits.dtype)
    if equal is not None:
        equal = add(objective.accumulate_equal, equal, is_part=masks.is_equal)
    return found._replace(num_negatives=num_negatives, equal=equal)


def merge(
    objective: Objective, one: RowStatistics, other: RowStatistics, scalars: Scalars
) -> RowStatistics:
    """Joins the statistics of two disjoint sets of partners."""
    found = _merge_part(objective.accumulate, one, other, scalars)
    num_negatives = equal = None
    if one.num_negatives is not None:
        num_negatives = one.num_negatives + other.num_negatives
    if one.equal is not None:
        equal = _merge_part(objective.accumulate_equal, one.equal, other.equal, scalars)
    return found._replace(num_negatives=num_negatives, equal=equal)


def pair_statistics(
    positives: Rows, images: RowStatistics, texts: RowStatistics, scale: jax.Array
) -> PairStatistics:
    """Cosines from logits; with a scale of 0 all logits are 0, and so are these."""
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
        # Another tile that is empty: the sums stay, but for what they are relative to.
        return accumulate(statistics, highest, no_logits, no_logits > 0, -1, scalars)

    ties = sum(jnp.where(part.highest == highest, part.ties, 0) for part in (one, other))
    sums = (sums_relative_to_highest(part) for part in (one, other))
    return RowStatistics(highest, ties, jax.tree.map(jnp.add, *sums))
