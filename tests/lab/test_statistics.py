"""The laboratory's statistics against scipy, tables made by hand, and simulated runs."""

import numpy as np
import pytest
import scipy.stats

from benchmarks.lab.experiments import GAIN, NO_LOSS, Contrast
from benchmarks.lab.statistics import (
    CONFIRMED,
    REFUTED,
    UNDECIDED,
    bootstrap_interval,
    decide,
    estimate,
    holm,
    t_interval,
    t_test,
)


def contrast(kind=GAIN, margin=0.02):
    return Contrast("new", "old", "filter", margin, "it helps", "it does not", kind)


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("null", [0.0, -0.01])
def test_interval_and_p_value_are_those_of_scipy(count, null):
    differences = np.random.default_rng(count).normal(0.02, 0.03, count)
    truth = scipy.stats.ttest_1samp(differences, null, alternative="greater")
    both = scipy.stats.ttest_1samp(differences, null).confidence_interval(0.95)
    np.testing.assert_allclose(t_interval(differences), (both.low, both.high), rtol=1e-9)
    assert t_test(differences, null) == pytest.approx(min(1, 2 * truth.pvalue), rel=1e-9)
    # The doubled p-value is below 5% just where the interval is above the null.
    assert (t_test(differences, null) < 0.05) == (t_interval(differences)[0] > null)


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.015 x 3, 0.02 x 2 (raised to the one before), 0.8.
    assert holm([0.02, 0.01, 0.8, 0.015]) == pytest.approx([0.045, 0.04, 0.8, 0.045])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("kind", "mean", "reach", "verdict"),
    [
        (GAIN, 0.03, 0.02, CONFIRMED),
        (GAIN, 0.02, 0.01, CONFIRMED),  # the mean is the margin
        (GAIN, 0.015, 0.01, UNDECIDED),  # above 0, less than the margin
        (GAIN, 0.03, 0.04, UNDECIDED),
        (GAIN, 0.0, 0.01, REFUTED),
        (GAIN, 0.01, 0.005, REFUTED),  # a gain, and too small a one
        (NO_LOSS, 0.0, 0.01, CONFIRMED),
        (NO_LOSS, -0.01, 0.005, CONFIRMED),
        (NO_LOSS, -0.02, 0.01, UNDECIDED),
        (NO_LOSS, -0.04, 0.01, REFUTED),
    ],
)
def test_verdicts_by_hand(kind, mean, reach, verdict):
    # Two values whose t interval has this reach: t of one degree of freedom is 12.7062.
    half = reach / 12.706204736
    found = estimate(contrast(kind), [0.5 + mean - half, 0.5 + mean + half], [0.5, 0.5])
    assert (found.low, found.high) == pytest.approx((mean - reach, mean + reach), abs=1e-9)
    assert decide(contrast(kind), found) == verdict


def test_the_bootstrap_covers_a_known_difference_of_crossed_factors():
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(150):
        # Items that differ in how much they gain, and runs that do.
        gains = 0.05 + rng.normal(0, 0.02, (12, 1)) + rng.normal(0, 0.3, (1, 150))
        runs = gains + rng.normal(0, 0.3, (12, 150))
        low, high = bootstrap_interval(runs, num_resamples=300)
        covered.append(low <= 0.05 <= high)
    assert 0.9 <= np.mean(covered) <= 0.99
