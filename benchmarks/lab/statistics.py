"""What the runs say about a contrast: paired differences, intervals, and a verdict.

Runs of equal seeds are compared with each other. The interval that decides is Student's t over the
seeds; next to it stands a bootstrap over seeds and test items. Holm's correction is over all
registered contrasts, those without runs included, so that no verdict becomes easier by not making
the runs of another one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy.special

from benchmarks.lab.experiments import GAIN, Contrast

LEVEL = 0.95
NUM_RESAMPLES = 2000

CONFIRMED, REFUTED, UNDECIDED, WAITING = "confirmed", "refuted", "undecided", "waiting"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A contrast's difference, in shares of 1.

    Attributes:
        differences: treated minus control, seed by seed.
        mean: of them.
        low, high: the t interval of the mean; infinite with a single seed.
        p_value: of "no better than `null`", doubled, so that it is below 1 - LEVEL just where
            `low` is above `null`.
        resampled: the bootstrap's interval over seeds and items; None without items.
    """

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_value: float
    resampled: tuple[float, float] | None


def null_of(contrast: Contrast) -> float:
    """The difference that the treated has to exceed."""
    return 0.0 if contrast.kind == GAIN else -contrast.margin


def estimate(
    contrast: Contrast,
    treated: Sequence[float],
    control: Sequence[float],
    treated_items: Sequence[np.ndarray] | None = None,
    control_items: Sequence[np.ndarray] | None = None,
) -> Estimate:
    """The difference of a contrast.

    Args:
        contrast: which one.
        treated, control: the metric of each seed, in one order.
        treated_items, control_items: of each seed the results of the test items, float [n].

    Raises:
        ValueError: no runs, or not as many of both.
    """
    if len(treated) != len(control) or not len(treated):
        raise ValueError(
            f"'{contrast.treated}' against '{contrast.control}': expected runs of the same seeds, "
            f"got {len(treated)} and {len(control)}"
        )
    differences = np.subtract(treated, control)
    low, high = t_interval(differences)
    resampled = None
    if treated_items is not None and control_items is not None:
        resampled = bootstrap_interval(np.subtract(treated_items, control_items))
    return Estimate(
        differences=tuple(differences.tolist()),
        mean=float(differences.mean()),
        low=low,
        high=high,
        p_value=t_test(differences, null_of(contrast)),
        resampled=resampled,
    )


def t_interval(differences: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """Student's interval of the mean; infinite with a single value."""
    count, mean = len(differences), float(np.mean(differences))
    if count < 2:
        return -math.inf, math.inf
    quantile = scipy.special.stdtrit(count - 1, (1 + level) / 2)
    reach = float(quantile * np.std(differences, ddof=1) / math.sqrt(count))
    return mean - reach, mean + reach


def t_test(differences: np.ndarray, null: float = 0.0) -> float:
    """Twice the probability of so large a mean if the true one were `null`; 1 at most."""
    count, mean = len(differences), float(np.mean(differences))
    if count < 2:
        return 1.0
    error = float(np.std(differences, ddof=1)) / math.sqrt(count)
    if error == 0:
        return 0.0 if mean > null else 1.0
    return min(1.0, 2 * float(scipy.special.stdtr(count - 1, -(mean - null) / error)))


def bootstrap_interval(
    differences: np.ndarray,
    *,
    level: float = LEVEL,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap of the mean over two crossed factors.

    Args:
        differences: float [seeds, items]; a resample draws seeds and, for all of them alike, items.
        level: share of the resamples inside the interval.
        num_resamples: how many draws.
        seed: of the draws.
    """
    num_seeds, num_items = differences.shape
    of_seeds, of_items = _draw(num_seeds, num_items, num_resamples, seed)
    means = ((of_seeds / num_seeds) @ differences * (of_items / num_items)).sum(axis=1)
    tail = 50 * (1 - level)
    low, high = np.percentile(means, [tail, 100 - tail]).tolist()
    return low, high


@functools.lru_cache(maxsize=2)  # contrasts of as many seeds and items have the same draws
def _draw(
    num_seeds: int, num_items: int, num_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each seed, and each item, is in each resample: int64 [num_resamples, n]."""
    rng = np.random.default_rng(seed)
    of_seeds = rng.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)
    of_items = rng.multinomial(num_items, np.full(num_items, 1 / num_items), num_resamples)
    return of_seeds, of_items


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): adjusted p-values in the order given."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def decide(contrast: Contrast, found: Estimate) -> str:
    """The verdict on a contrast whose runs are all there."""
    if contrast.kind == GAIN:
        if found.low > 0 and found.mean >= contrast.margin:
            return CONFIRMED
        return REFUTED if found.high < contrast.margin else UNDECIDED
    if found.low > -contrast.margin:
        return CONFIRMED
    return REFUTED if found.high < -contrast.margin else UNDECIDED
