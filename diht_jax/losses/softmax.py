"""InfoNCE and HN-NCE: the softmax over all partners of a row, with weighted negatives."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from diht_jax.losses.objective import (
    Objective,
    RowSlopes,
    RowStatistics,
    Scalars,
    check_scalar,
)


@dataclasses.dataclass(frozen=True)
class Softmax(Objective):
    """InfoNCE and HN-NCE; its scalars are `alpha` and `beta`.

    With LSE over the negatives j of row i,
    `A = LSE((1+beta) s_ij)`, `B = LSE(beta s_ij)`, `z = log(N-1) + A - B - s_ii`,

        L_i = logaddexp(log alpha, z)              p = dL_i/dz = sigmoid(z - log alpha)
        dL_i/ds_ij = p ((1+beta) e^{(1+beta) s_ij - A} - beta e^{beta s_ij - B})

    which needs no exponential of a logit: nothing overflows, nothing underflows to 0/0, and a loss
    near zero keeps its digits because s_ii is taken off before the logaddexp. The sums are those of
    A and B, relative to the highest negative.

    Attributes:
        weighted: False when beta is known to be 0: B is log(N-1) and drops out.
        stop_weight_gradient: the weights count as constants: dL_i/ds_ij = p e^{(1+beta) s_ij - A}.
        differentiate_beta: beta is traced, so that its derivative may be requested.

    Source: DiHT, arXiv 2301.02280, "Hard-negative contrastive loss".
    """

    title: ClassVar[str] = "InfoNCE, HN-NCE"
    settings: ClassVar[dict[str, Any]] = {
        "alpha": 1.0,  # weight of the positive in the denominator
        "beta": 0.0,  # hardness of the negatives; alpha 1 and beta 0 is InfoNCE
        "stop_weight_gradient": False,  # treat the weights of the negatives as constants
    }

    weighted: bool
    stop_weight_gradient: bool = False
    differentiate_beta: bool = False

    @classmethod
    def create(
        cls, alpha: jax.Array | float, beta: jax.Array | float, stop_weight_gradient: bool
    ) -> tuple[Self, Scalars]:
        """See `Objective.create`; traced values are not checked and take the general path."""
        check_scalar("alpha", alpha)
        check_scalar("beta", beta)
        _check_range("alpha", alpha, "a number in [0, 1]", lambda value: 0 <= value <= 1)
        _check_range("beta", beta, "a finite number >= 0", lambda value: 0 <= value < math.inf)
        objective = cls(
            weighted=not is_known_zero(beta),
            stop_weight_gradient=stop_weight_gradient,
            differentiate_beta=isinstance(beta, jax.core.Tracer),
        )
        return objective, (alpha, beta)

    @property
    def num_sums(self) -> int:
        """Of `e^{(1+beta) s}` and, for weights, of `e^{beta s}`."""
        return 2 if self.weighted else 1

    @property
    def second_pass(self) -> tuple[int, ...]:
        """See `Objective`."""
        beta_matters = self.weighted and not self.stop_weight_gradient
        return (1,) if self.differentiate_beta and beta_matters else ()

    def accumulate(
        self,
        statistics: RowStatistics,
        highest: jax.Array,
        logits: jax.Array,
        is_negative: jax.Array,
        axis: int,
        scalars: Scalars,
    ) -> tuple[jax.Array, ...]:
        """See `Objective.accumulate`."""
        below = jnp.where(is_negative, logits - jnp.expand_dims(highest, axis), -jnp.inf)
        shrink = statistics.highest - highest
        return tuple(
            old * jnp.exp(factor * shrink) + jnp.sum(_exp(factor, below, is_negative), axis)
            for old, factor in zip(statistics.sums, self._factors(scalars), strict=True)
        )

    def finish(
        self, statistics: RowStatistics, positives: jax.Array, scalars: Scalars, num_pairs: int
    ) -> tuple[jax.Array, RowSlopes]:
        """See `Objective.finish`."""
        log_alpha = jnp.log(scalars[0])
        offsets = tuple(
            factor * statistics.highest + jnp.log(total)
            for factor, total in zip(self._factors(scalars), statistics.sums, strict=True)
        )
        margin = offsets[0] - positives
        if self.weighted:
            margin += math.log(num_pairs - 1) - offsets[1]
        losses = jnp.logaddexp(log_alpha, margin)
        slope = jax.nn.sigmoid(margin - log_alpha)
        by_beta = jnp.zeros_like(losses)
        return losses, RowSlopes(-slope, slope, offsets, (jnp.exp(-losses), by_beta))

    def negative_slope(
        self, logits: jax.Array, slopes: RowSlopes, axis: int, scalars: Scalars
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """See `Objective.negative_slope`."""
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

    def loss_of_rows(
        self, logits: jax.Array, is_positive: jax.Array, scalars: Scalars
    ) -> jax.Array:
        """See `Objective.loss_of_rows`."""
        alpha, beta = scalars
        positives = jnp.sum(logits, axis=1, where=is_positive)
        log_alpha = jnp.log(jnp.asarray(alpha, logits.dtype))
        if logits.shape[1] == 1:
            return log_alpha + jnp.zeros_like(positives)
        if not self.weighted:
            negatives = jax.nn.logsumexp(logits, axis=1, where=~is_positive)
        else:
            tilt = jnp.asarray(beta, logits.dtype) * logits
            if self.stop_weight_gradient:
                tilt = jax.lax.stop_gradient(tilt)
            negatives = (
                math.log(logits.shape[1] - 1)
                + jax.nn.logsumexp(logits + tilt, axis=1, where=~is_positive)
                - jax.nn.logsumexp(tilt, axis=1, where=~is_positive)
            )
        return jnp.logaddexp(log_alpha, negatives - positives)

    def _factors(self, scalars: Scalars) -> tuple[jax.Array | float, ...]:
        beta = scalars[1]
        return (1 + beta, beta) if self.weighted else (1.0,)


def is_known_zero(value: jax.Array | float) -> bool:
    """Whether `value` is 0 and not traced."""
    return not isinstance(value, jax.core.Tracer) and float(value) == 0


def _check_range(name: str, value: Any, expected: str, is_right: Callable[[float], bool]) -> None:
    if not isinstance(value, jax.core.Tracer) and not is_right(float(value)):
        raise ValueError(f"{name}: expected {expected}, got {value}")


def _exp(factor: jax.Array | float, below: jax.Array, is_negative: jax.Array) -> jax.Array:
    """e^(factor * below), and 0 where there is no negative, even for a factor of 0."""
    return jnp.where(is_negative, jnp.exp(factor * below), 0)
