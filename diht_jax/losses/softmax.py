"""InfoNCE and HN-NCE: a softmax over each row of the logits, with weighted negatives."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from diht_jax.config.keys import NOT_NEGATIVE, Key, Range
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
class Softmax(Objective):
    """InfoNCE and HN-NCE; its scalars are `alpha` and `beta`.

    With LSE over the negatives j of row i,
    `A = LSE((1+beta) s_ij)`, `B = LSE(beta s_ij)`, `z = log(N-1) + A - B - s_ii`,

        L_i = logaddexp(log alpha, z)              p = dL_i/dz = sigmoid(z - log alpha)
        dL_i/ds_ij = p ((1+beta) e^{(1+beta) s_ij - A} - beta e^{beta s_ij - B})

    This formula does not exponentiate logits, so nothing overflows or underflows to 0/0. A loss
    near zero keeps its precision, because s_ii is subtracted before the logaddexp. The running sums
    are those of A and B, relative to the highest negative.

    If equal pairs are not negatives, N - 1 is the number of remaining negatives of the row, and a
    row without negatives has a loss of 0. If they are positives P_i, with the mean m = mean_p s_ip
    and the spread r = LSE_p(s_ip - m),

        L_i = logaddexp(log alpha + r, z)  with m in place of s_ii in z
        dL_i/ds_ip = (1 - p) e^{s_ip - m - r} - 1/|P_i|       p = sigmoid(z - log alpha - r)

    Attributes:
        weighted: False if beta is known to be 0; then B is log(N-1) and cancels.
        stop_weight_gradient: weights are constants: dL_i/ds_ij = p e^{(1+beta) s_ij - A}.
        differentiate_beta: whether beta is traced, so its derivative may be requested.
        equal_pairs: see `Objective`.

    Source: DiHT, arXiv 2301.02280, "Hard-negative contrastive loss"; several positives: UniCL,
    arXiv 2204.03610.
    """

    settings: ClassVar[dict[str, Any]] = {
        "alpha": Key(1.0, Range(0, 1)),  # weight of the positive in the denominator
        "beta": Key(0.0, NOT_NEGATIVE),  # hardness of the negatives; alpha 1 and beta 0 is InfoNCE
        "stop_weight_gradient": False,  # treat the weights of the negatives as constants
        # Relation of pairs with equal texts, or of the same class: "negative", "mask" (neither
        # positives nor negatives) or "positive".
        "equal_pairs": "negative",
    }

    weighted: bool
    stop_weight_gradient: bool = False
    differentiate_beta: bool = False
    equal_pairs: str = "negative"

    num_equal_sums = 3  # the sums of `e^s` and of s, and the count

    @classmethod
    def create(
        cls,
        alpha: jax.Array | float,
        beta: jax.Array | float,
        stop_weight_gradient: bool,
        equal_pairs: str = "negative",
    ) -> tuple[Softmax, Scalars]:
        """See `Objective.create`; traced values are not checked and use the general formula."""
        check_equal_pairs(equal_pairs)
        check_scalar("alpha", alpha)
        check_scalar("beta", beta)
        _check_range("alpha", alpha, 1.0, "a number in [0, 1]")
        _check_range("beta", beta, sys.float_info.max, "a finite number >= 0")
        objective = cls(
            weighted=not is_known_zero(beta),
            stop_weight_gradient=stop_weight_gradient,
            differentiate_beta=isinstance(beta, jax.core.Tracer),
            equal_pairs=equal_pairs,
        )
        return objective, (alpha, beta)

    @property
    def num_sums(self) -> int:
        """Number of sums: that of `e^{(1+beta) s}` and, for weights, that of `e^{beta s}`."""
        return 2 if self.weighted else 1

    @property
    def second_pass(self) -> tuple[int, ...]:
        beta_matters = self.weighted and not self.stop_weight_gradient
        return (1,) if self.differentiate_beta and beta_matters else ()

    def accumulate(
        self,
        statistics: RowStatistics,
        highest: Rows,
        logits: Tile,
        is_negative: TileMask,
        axis: int,
        scalars: Scalars,
    ) -> tuple[Rows, ...]:
        below = jnp.where(is_negative, logits - jnp.expand_dims(highest, axis), -jnp.inf)
        shrink = statistics.highest - highest
        return tuple(
            old * jnp.exp(factor * shrink) + jnp.sum(_exp(factor, below, is_negative), axis)
            for old, factor in zip(statistics.sums, self._factors(scalars), strict=True)
        )

    def finish(
        self, statistics: RowStatistics, positives: Rows, scalars: Scalars, num_pairs: int
    ) -> tuple[Rows, RowSlopes]:
        log_alpha = jnp.log(scalars[0])
        log_count, has_negatives = math.log(num_pairs - 1), None
        if statistics.num_negatives is not None:
            has_negatives = statistics.num_negatives > 0
            log_count = jnp.log(jnp.maximum(statistics.num_negatives, 1))
            # A negative logit of 0 keeps the logarithms of rows without negatives finite.
            statistics = statistics._replace(
                highest=jnp.where(has_negatives, statistics.highest, 0),
                sums=tuple(jnp.where(has_negatives, total, 1) for total in statistics.sums),
            )
        offsets = tuple(
            factor * statistics.highest + jnp.log(total)
            for factor, total in zip(self._factors(scalars), statistics.sums, strict=True)
        )
        log_spread, own = 0.0, positives
        if statistics.equal is not None:
            positives, log_spread, count, log_sum = _with_equal(statistics.equal, own)
            log_alpha += log_spread
        margin = offsets[0] - positives
        if self.weighted:
            margin += log_count - offsets[1]
        losses = jnp.logaddexp(log_alpha, margin)
        slope = jax.nn.sigmoid(margin - log_alpha)
        by_beta = jnp.zeros_like(losses)
        by_alpha = jnp.exp(log_spread - losses)
        by_positive, by_equal = -slope, ()
        if statistics.equal is not None:
            share = jax.nn.sigmoid(log_alpha - margin)  # of all positives in the denominator
            by_positive = share * jnp.exp(own - log_sum) - 1 / count
            by_equal, offsets = (share, -1 / count), (*offsets, log_sum)
        found = (losses, by_positive, slope, (by_alpha, by_beta), by_equal)
        if has_negatives is not None:
            found = jax.tree.map(lambda x: jnp.where(has_negatives, x, 0), found)
        losses, by_positive, slope, by_scalars, by_equal = found
        return losses, RowSlopes(by_positive, slope, offsets, by_scalars, by_equal)

    def negative_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile, ...]]:
        beta = scalars[1]
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

    def accumulate_equal(
        self,
        statistics: RowStatistics,
        highest: Rows,
        logits: Tile,
        is_equal: TileMask,
        axis: int,
        scalars: Scalars,
    ) -> tuple[Rows, ...]:
        below = jnp.where(is_equal, logits - jnp.expand_dims(highest, axis), -jnp.inf)
        shrunk = statistics.sums[0] * jnp.exp(statistics.highest - highest)
        return (
            shrunk + jnp.sum(_exp(1.0, below, is_equal), axis),
            statistics.sums[1] + jnp.sum(jnp.where(is_equal, logits, 0), axis),
            statistics.sums[2] + jnp.sum(is_equal, axis).astype(logits.dtype),
        )

    def equal_slope(
        self, logits: Tile, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[Tile, tuple[Tile | int, ...]]:
        share, constant = (jnp.expand_dims(factor, axis) for factor in slopes.equal)
        slope = share * jnp.exp(logits - jnp.expand_dims(slopes.offsets[-1], axis)) + constant
        return slope, (0,) * len(self.second_pass)

    def loss_of_rows(
        self,
        logits: Float[Array, "b N"],
        is_positive: Bool[Array, "b N"],
        scalars: Scalars,
        is_equal: Bool[Array, "b N"] | None = None,
    ) -> Float[Array, " b"]:
        alpha, beta = scalars
        positives = jnp.sum(logits, axis=1, where=is_positive)
        log_alpha = jnp.log(jnp.asarray(alpha, logits.dtype))
        if logits.shape[1] == 1:  # no negatives
            return jnp.zeros_like(positives) + (log_alpha if is_equal is None else 0)
        is_negative, log_count = ~is_positive, math.log(logits.shape[1] - 1)
        if is_equal is not None:
            is_negative &= ~is_equal
            has_negatives = jnp.any(is_negative, axis=1)
            # A row without negatives uses all logits, to keep its logarithms finite; see below.
            is_negative |= ~has_negatives[:, None]
            log_count = jnp.log(jnp.sum(is_negative, axis=1).astype(logits.dtype))
        if self.equal_pairs == "positive" and is_equal is not None:
            is_positive = is_positive | is_equal
            positives = jnp.mean(logits, axis=1, where=is_positive)
            below = logits - positives[:, None]
            log_alpha += jax.nn.logsumexp(below, axis=1, where=is_positive)
        if not self.weighted:
            negatives = jax.nn.logsumexp(logits, axis=1, where=is_negative)
        else:
            tilt = jnp.asarray(beta, logits.dtype) * logits
            if self.stop_weight_gradient:
                tilt = jax.lax.stop_gradient(tilt)
            log_sum = jax.nn.logsumexp(tilt, axis=1, where=is_negative)
            negatives = (
                log_count + jax.nn.logsumexp(logits + tilt, axis=1, where=is_negative) - log_sum
            )
        losses = jnp.logaddexp(log_alpha, negatives - positives)
        return losses if is_equal is None else jnp.where(has_negatives, losses, 0)

    def _factors(self, scalars: Scalars) -> tuple[jax.Array | float, ...]:
        beta = scalars[1]
        return (1 + beta, beta) if self.weighted else (1.0,)


def is_known_zero(value: jax.Array | float) -> bool:
    """Returns whether a value is 0 and not traced."""
    return not isinstance(value, jax.core.Tracer) and float(value) == 0


def _check_range(name: str, value: Any, most: float, expected: str) -> None:
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(value) <= most:
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _exp(factor: jax.Array | float, below: Tile, is_part: TileMask) -> Tile:
    """Returns e^(factor * below), and 0 outside of `is_part`, even for a factor of 0."""
    return jnp.where(is_part, jnp.exp(factor * below), 0)


def _with_equal(equal: RowStatistics, own: Rows) -> tuple[Rows, Rows, Rows, Rows]:
    """Returns the mean and the spread of all positives, their count, and their LSE.

    Args:
        equal: statistics of the positives other than the pairs themselves.
        own: logits of the pairs themselves.
    """
    exponentials, total, others = equal.sums
    mean = (own + total) / (others + 1)
    highest = jnp.maximum(own, equal.highest)
    sums = jnp.exp(own - highest) + exponentials * jnp.exp(equal.highest - highest)
    log_sum = highest + jnp.log(sums)
    return mean, log_sum - mean, others + 1, log_sum
