"""SigLIP's loss: a binary classification of every image with every text."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diht_jax.losses.objective import (
    Objective,
    Rows,
    RowSlopes,
    RowStatistics,
    Scalars,
    Tile,
    TileMask,
    check_equal_pairs,
    check_scalar,
)


@dataclasses.dataclass(frozen=True)
class Sigmoid(Objective):
    """SigLIP's loss with a learnt scalar, `logit_bias`.

        L_i = sum_{j != i} softplus(s_ij + bias) + softplus(-(s_ii + bias))

    The sum over rows and columns counts every pair twice. Equal pairs that are positives have the
    same loss term as s_ii.

    Source: Zhai et al., arXiv 2303.15343.
    """

    # SigLIP's initial values, which softly classify all pairs as negatives.
    parameters: ClassVar[dict[str, float]] = {"logit_bias": -10.0}
    initial_logit_scale: ClassVar[float | None] = 10.0
    settings: ClassVar[dict[str, Any]] = {"equal_pairs": "negative"}  # see `softmax.py`

    equal_pairs: str = "negative"

    second_pass = (0,)
    num_equal_sums = 1

    @classmethod
    def create(
        cls, logit_bias: jax.Array | float, equal_pairs: str = "negative"
    ) -> tuple[Sigmoid, Scalars]:
        check_scalar("logit_bias", logit_bias)
        check_equal_pairs(equal_pairs)
        return cls(equal_pairs), (logit_bias,)

    def accumulate(
        self,
        statistics: RowStatistics,
        highest: Rows,
        logits: Tile,
        is_negative: TileMask,
        axis: int,
        scalars: Scalars,
    ) -> tuple[Rows, ...]:
        losses = jnp.where(is_negative, jax.nn.softplus(logits + scalars[0]), 0)
        return (statistics.sums[0] + jnp.sum(losses, axis),)

    def finish(
        self, statistics: RowStatistics, positives: Rows, scalars: Scalars, num_pairs: int
    ) -> tuple[Rows, RowSlopes]:
        losses = statistics.sums[0] + jax.nn.softplus(-(positives + scalars[0]))
        if statistics.equal is not None:
            losses += statistics.equal.sums[0]
        slope = -jax.nn.sigmoid(-(positives + scalars[0]))
        return losses, RowSlopes(slope, jnp.ones_like(slope), (), (slope,))

    def negative_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile, ...]]:
        slope = jnp.expand_dims(slopes.negative, axis) * jax.nn.sigmoid(logits + scalars[0])
        return slope, (slope,)

    def accumulate_equal(
        self,
        statistics: RowStatistics,
        highest: Rows,
        logits: Tile,
        is_equal: TileMask,
        axis: int,
        scalars: Scalars,
    ) -> tuple[Rows, ...]:
        losses = jnp.where(is_equal, jax.nn.softplus(-(logits + scalars[0])), 0)
        return (statistics.sums[0] + jnp.sum(losses, axis),)

    def equal_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile | int, ...]]:
        slope = -jnp.expand_dims(slopes.negative, axis) * jax.nn.sigmoid(-(logits + scalars[0]))
        return slope, (slope,)

    def loss_of_rows(
        self,
        logits: Float[Array, "b N"],
        is_positive: Bool[Array, "b N"],
        scalars: Scalars,
        is_equal: Bool[Array, "b N"] | None = None,
    ) -> Float[Array, " b"]:
        if self.equal_pairs == "positive" and is_equal is not None:
            is_positive = is_positive | is_equal
        signs = jnp.where(is_positive, 1, -1).astype(logits.dtype)
        losses = jax.nn.log_sigmoid(signs * (logits + scalars[0]))
        if self.equal_pairs == "mask" and is_equal is not None:
            losses = jnp.where(is_equal, 0, losses)
        return -jnp.sum(losses, axis=1)
