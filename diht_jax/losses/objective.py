"""The members of the loss family, as what the streaming form needs to know of each.

A loss of the family is a sum over rows i of the logits s and over columns, by the same rule. For
one row: running statistics over tiles of negatives (`start`, `accumulate`), from which and from
the positive the loss and its slopes follow (`finish`), which in turn give the derivative of the
row's loss by each negative logit (`negative_slope`). Everything is elementwise; the products and
the ring are `streaming.py`'s.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp


class RowStatistics(NamedTuple):
    """Running statistics of rows (or columns), each [b].

    Attributes:
        highest: highest negative logit so far; finite from the start.
        ties: number of negatives that reach it.
        sums: of the objective, relative to `highest`.
    """

    highest: jax.Array
    ties: jax.Array
    sums: tuple[jax.Array, ...]


class RowSlopes(NamedTuple):
    """What the backward pass keeps of rows (or columns), each [b].

    Attributes:
        positive: derivative of the row's loss by its positive logit.
        negative: factor of the derivative by a negative logit.
        offsets: of the objective.
        parameters: derivatives by the parameters that need no second pass over the logits.
    """

    positive: jax.Array
    negative: jax.Array
    offsets: tuple[jax.Array, ...]
    parameters: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Softmax:
    """InfoNCE and HN-NCE; its parameters are `alpha` and `beta`.

    With LSE over the negatives j of row i,
    `A = LSE((1+beta) s_ij)`, `B = LSE(beta s_ij)`, `z = log(N-1) + A - B - s_ii`,

        L_i = logaddexp(log alpha, z)              p = dL_i/dz = sigmoid(z - log alpha)
        dL_i/ds_ij = p ((1+beta) e^{(1+beta) s_ij - A} - beta e^{beta s_ij - B})

    (DiHT, arXiv 2301.02280, "Hard-negative contrastive loss".)

    Attributes:
        weighted: False when beta is known to be 0: B is log(N-1) and drops out.
        stop_weight_gradient: the weights count as constants: dL_i/ds_ij = p e^{(1+beta) s_ij - A}.
        differentiate_beta: beta is traced, so that its derivative may be asked for.
    """

    weighted: bool
    stop_weight_gradient: bool = False
    differentiate_beta: bool = False

    @property
    def second_pass(self) -> tuple[int, ...]:
        """Positions of the parameters whose derivative needs the logits once more."""
        beta_matters = self.weighted and not self.stop_weight_gradient
        return (1,) if self.differentiate_beta and beta_matters else ()

    def start(self, zeros: jax.Array) -> RowStatistics:
        """Statistics of no negatives; `zeros` has the shape and dtype of each."""
        # The lowest finite number, not -inf: differences of two of them must not be NaN.
        lowest = zeros + jnp.finfo(zeros.dtype).min
        return RowStatistics(lowest, zeros, (zeros, zeros) if self.weighted else (zeros,))

    def accumulate(
        self,
        statistics: RowStatistics,
        logits: jax.Array,
        is_negative: jax.Array,
        axis: int,
        parameters: tuple[jax.Array, ...],
    ) -> RowStatistics:
        """Adds the negatives of a tile; `axis` is that of the tile which is summed over."""
        highest, ties = _highest(statistics, logits, is_negative, axis)
        below = jnp.where(is_negative, logits - jnp.expand_dims(highest, axis), -jnp.inf)
        shrink = statistics.highest - highest
        sums = tuple(
            old * jnp.exp(factor * shrink) + jnp.sum(_exp(factor, below, is_negative), axis)
            for old, factor in zip(statistics.sums, self._factors(parameters), strict=True)
        )
        return RowStatistics(highest, ties, sums)

    def finish(
        self,
        statistics: RowStatistics,
        positives: jax.Array,
        parameters: tuple[jax.Array, ...],
        num_pairs: int,
    ) -> tuple[jax.Array, RowSlopes]:
        """Losses [b] and slopes, once all negatives are in."""
        alpha, beta = parameters
        log_alpha = jnp.log(alpha)
        offsets = tuple(
            factor * statistics.highest + jnp.log(total)
            for factor, total in zip(self._factors(parameters), statistics.sums, strict=True)
        )
        margin = offsets[0] - positives
        if self.weighted:
            margin += math.log(num_pairs - 1) - offsets[1]
        losses = jnp.logaddexp(log_alpha, margin)
        slope = jax.nn.sigmoid(margin - log_alpha)
        by_beta = jnp.zeros_like(losses)
        return losses, RowSlopes(-slope, slope, offsets, (jnp.exp(-losses), by_beta))

    def negative_slope(
        self,
        logits: jax.Array,
        slopes: RowSlopes,
        axis: int,
        parameters: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Derivatives by a tile of negative logits, and by the `second_pass` parameters."""
        beta = parameters[1]
        factor = jnp.expand_dims(slopes.negative, axis)
        offsets = [jnp.expand_dims(offset, axis) for offset in slopes.offsets]
        if not self.weighted:
            return factor * jnp.exp(logits - offsets[0]), ()
        share = jnp.exp((1 + beta) * logits - offsets[0])
        if self.stop_weight_gradient:
            return factor * share, ()
        weight = jnp.exp(beta * logits - offsets[1])
        by_beta = (factor * (share - weight) * logits,) if self.second_pass else ()
        return factor * ((1 + beta) * share - beta * weight), by_beta

    def _factors(self, parameters: tuple[jax.Array, ...]) -> tuple[jax.Array | float, ...]:
        beta = parameters[1]
        return (1 + beta, beta) if self.weighted else (1.0,)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """SigLIP (arXiv 2303.15343): every pair is a yes-no question; its parameter is the bias.

    L_i = sum_{j != i} softplus(s_ij + bias) + softplus(-(s_ii + bias))

    Summed over rows and over columns, every pair counts twice.
    """

    second_pass = (0,)

    def start(self, zeros: jax.Array) -> RowStatistics:
        """See `Softmax.start`."""
        return RowStatistics(zeros + jnp.finfo(zeros.dtype).min, zeros, (zeros,))

    def accumulate(
        self,
        statistics: RowStatistics,
        logits: jax.Array,
        is_negative: jax.Array,
        axis: int,
        parameters: tuple[jax.Array, ...],
    ) -> RowStatistics:
        """See `Softmax.accumulate`."""
        highest, ties = _highest(statistics, logits, is_negative, axis)
        losses = jnp.where(is_negative, jax.nn.softplus(logits + parameters[0]), 0)
        return RowStatistics(highest, ties, (statistics.sums[0] + jnp.sum(losses, axis),))

    def finish(
        self,
        statistics: RowStatistics,
        positives: jax.Array,
        parameters: tuple[jax.Array, ...],
        num_pairs: int,
    ) -> tuple[jax.Array, RowSlopes]:
        """See `Softmax.finish`."""
        del num_pairs
        losses = statistics.sums[0] + jax.nn.softplus(-(positives + parameters[0]))
        slope = -jax.nn.sigmoid(-(positives + parameters[0]))
        return losses, RowSlopes(slope, jnp.ones_like(slope), (), (slope,))

    def negative_slope(
        self,
        logits: jax.Array,
        slopes: RowSlopes,
        axis: int,
        parameters: tuple[jax.Array, ...],
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """See `Softmax.negative_slope`."""
        slope = jnp.expand_dims(slopes.negative, axis) * jax.nn.sigmoid(logits + parameters[0])
        return slope, (slope,)


Objective = Softmax | Sigmoid


def _highest(
    statistics: RowStatistics, logits: jax.Array, is_negative: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array]:
    """The running maximum over negatives, and how many reach it."""
    lowest = jnp.finfo(logits.dtype).min
    highest = jnp.maximum(statistics.highest, jnp.max(jnp.where(is_negative, logits, lowest), axis))
    reached = is_negative & (logits == jnp.expand_dims(highest, axis))
    before = jnp.where(statistics.highest == highest, statistics.ties, 0)
    return highest, before + jnp.sum(reached, axis).astype(logits.dtype)


def _exp(factor: jax.Array | float, below: jax.Array, is_negative: jax.Array) -> jax.Array:
    """e^(factor * below), and 0 where there is no negative, even for a factor of 0."""
    return jnp.where(is_negative, jnp.exp(factor * below), 0)
