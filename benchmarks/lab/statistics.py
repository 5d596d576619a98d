"""Statistics of a contrast: the difference between its runs, an interval, and a label.

Runs on the same data are compared seed by seed, since they share the order of examples. Runs of the
block `drawn` are compared web by web, all others as two samples (Welch). Each interval combines
Student's t over the runs and a bootstrap over runs and test items, with the lower of their lower
ends and the higher of their higher ends. If runs have their own items, such as other held-out
concepts, items are drawn within runs. Holm's correction counts all primary claims, also those
without runs: a claim does not become easier because the runs of another one are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import scipy.special

LEVEL = 0.95
NUM_RESAMPLES = 1000

LARGE_GAIN, LARGE_HARM = "gain of at least the margin", "harm of at least the margin"
GAIN, HARM = "gain", "harm"
SMALL_GAIN, SMALL_HARM = "gain, smaller than the margin", "harm, smaller than the margin"
NONE, UNDECIDED, WAITING = "none within the margin", "undecided", "waiting for runs"


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The difference of a contrast, in shares of 1.

    Attributes:
        differences: treated minus control, seed by seed; if unpaired, each treated run minus the
            mean of the control.
        mean: mean of the differences.
        low, high: the wider of both intervals, end by end; infinite if an arm has a single run.
        p_value: two-sided, for no difference; the larger of the t test's and the bootstrap's.
    """

    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_value: float


def estimate(
    treated: Sequence[float],
    control: Sequence[float],
    treated_items: Sequence[np.ndarray] | None = None,
    control_items: Sequence[np.ndarray] | None = None,
    *,
    paired: bool,
    own_items: bool = False,
) -> Estimate:
    """Estimates the difference between two arms.

    Args:
        treated, control: the metric of each run; paired runs are in the same order.
        treated_items, control_items: results of the test items for each run, float [n].
        paired: whether runs with the same index are compared with each other.
        own_items: whether each pair of runs has its own test items.

    Raises:
        ValueError: an arm has no runs, or paired arms have different numbers of runs.
    """
    if not len(treated) or not len(control) or (paired and len(treated) != len(control)):
        raise ValueError(
            f"expected runs of both arms, as many where they are paired; got {len(treated)} and "
            f"{len(control)}"
        )
    if paired:
        differences = np.subtract(treated, control)
        error, freedom = _standard_error(differences), len(differences) - 1
    else:
        differences = np.subtract(treated, np.mean(control))
        error, freedom = _welch(np.asarray(treated), np.asarray(control))
    mean = float(differences.mean())
    low, high = t_interval(mean, error, freedom)
    p_value = t_test(mean, error, freedom)
    if treated_items is not None and control_items is not None and freedom > 0:
        means = bootstrap(treated_items, control_items, paired=paired, own_items=own_items)
        tail = 50 * (1 - LEVEL)
        ends = np.percentile(means, [tail, 100 - tail])
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
        beyond = min(np.sum(means <= 0), np.sum(means >= 0))
        p_value = max(p_value, min(1.0, 2 * float(beyond + 1) / (len(means) + 1)))
    return Estimate(tuple(differences.tolist()), mean, low, high, p_value)


def t_interval(
    mean: float, error: float, freedom: float, level: float = LEVEL
) -> tuple[float, float]:
    """Returns Student's interval of a mean from its standard error; infinite without freedom."""
    if freedom <= 0:
        return -math.inf, math.inf
    reach = float(scipy.special.stdtrit(freedom, (1 + level) / 2)) * error
    return mean - reach, mean + reach


def t_test(mean: float, error: float, freedom: float) -> float:
    """Returns the probability of a mean at least this far from 0 if the true mean is 0."""
    if freedom <= 0:
        return 1.0
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(scipy.special.stdtr(freedom, -abs(mean) / error))


def _standard_error(values: np.ndarray) -> float:
    if len(values) < 2:
        return math.inf
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _welch(treated: np.ndarray, control: np.ndarray) -> tuple[float, float]:
    """Returns Welch's standard error and degrees of freedom (Satterthwaite) of a difference."""
    if min(len(treated), len(control)) < 2:
        return math.inf, 0
    parts = [float(np.var(arm, ddof=1)) / len(arm) for arm in (treated, control)]
    if sum(parts) == 0:
        return 0.0, len(treated) + len(control) - 2
    below = sum(
        part**2 / (len(arm) - 1) for part, arm in zip(parts, (treated, control), strict=True)
    )
    return math.sqrt(sum(parts)), sum(parts) ** 2 / below


def bootstrap(
    treated: Sequence[np.ndarray],
    control: Sequence[np.ndarray],
    *,
    paired: bool,
    own_items: bool = False,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """Returns differences of means over resamples of two factors: runs and test items.

    Args:
        treated, control: the items of each run, float [items]. Both arms have the same items, which
            are drawn once for both. Paired runs are drawn once for both arms, others for each arm.
        paired: whether runs with the same index belong together.
        own_items: whether each pair of runs has its own items, drawn pair by pair; otherwise all
            runs have the same items.
        num_resamples: number of resamples.
        seed: seed of the resamples.

    Returns:
        Float [num_resamples].
    """
    runs = _draw(len(treated), num_resamples, seed + 1)
    if own_items:
        assert paired
        means = [
            _draw(len(ours), num_resamples, seed + 3 + place) @ (ours - others)
            for place, (ours, others) in enumerate(zip(treated, control, strict=True))
        ]
        return (runs * np.stack(means, axis=1)).sum(axis=1)
    first, second = np.asarray(treated), np.asarray(control)
    items = _draw(first.shape[1], num_resamples, seed).T
    if paired:
        return (runs * ((first - second) @ items).T).sum(axis=1)
    others = _draw(len(second), num_resamples, seed + 2)
    return (runs * (first @ items).T).sum(axis=1) - (others * (second @ items).T).sum(axis=1)


@functools.lru_cache(maxsize=16)  # contrasts with equally many runs and items share draws
def _draw(count: int, num_resamples: int, seed: int) -> np.ndarray:
    """Returns the share of each of `count` things per resample: float32 [num_resamples, count]."""
    drawn = np.random.default_rng(seed).integers(count, size=(num_resamples, count))
    drawn += count * np.arange(num_resamples)[:, None]
    counts = np.bincount(drawn.reshape(-1), minlength=num_resamples * count)
    return (counts.reshape(num_resamples, count) / count).astype(np.float32)


def holm(p_values: Sequence[float]) -> list[float]:
    """Applies Holm's step-down correction (1979); returns adjusted p-values in the given order."""
    order = np.argsort(p_values, kind="stable")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def label(found: Estimate, margin: float) -> str:
    """Labels an interval, by the same rule for every claim.

    Args:
        found: the estimated difference.
        margin: the smallest difference worth having, in shares of 1; positive.
    """
    if found.low > 0:
        if found.low >= margin:
            return LARGE_GAIN
        return SMALL_GAIN if found.high < margin else GAIN
    if found.high < 0:
        if found.high <= -margin:
            return LARGE_HARM
        return SMALL_HARM if found.low > -margin else HARM
    return NONE if -margin < found.low and found.high < margin else UNDECIDED
