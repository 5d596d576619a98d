"""The laboratory's statistics against scipy, hand-made tables, and simulated runs."""

import numpy as np
import pytest
import scipy.stats

from benchmarks.lab.experiments import CONTRASTS, PRIMARY, SECONDARY, key_of
from benchmarks.lab.statistics import (
    GAIN,
    HARM,
    LARGE_GAIN,
    LARGE_HARM,
    NONE,
    SMALL_GAIN,
    SMALL_HARM,
    UNDECIDED,
    Estimate,
    bootstrap,
    estimate,
    holm,
    label,
)


@pytest.mark.parametrize(
    "counts, paired", [((2, 2), True), ((8, 8), True), ((2, 3), False), ((8, 3), False)]
)
def test_runs_are_compared_as_scipy_does(counts, paired):
    rng = np.random.default_rng(counts)
    treated, control = rng.normal(0.02, 0.03, counts[0]), rng.normal(0.0, 0.01, counts[1])
    found = estimate(treated, control, paired=paired)
    if paired:
        truth = scipy.stats.ttest_rel(treated, control)
    else:
        truth = scipy.stats.ttest_ind(treated, control, equal_var=False)
    interval = truth.confidence_interval(0.95)
    np.testing.assert_allclose((found.low, found.high), (interval.low, interval.high), rtol=1e-9)
    assert found.p_value == pytest.approx(truth.pvalue, rel=1e-9)
    assert found.mean == pytest.approx(treated.mean() - control.mean())


def test_one_run_of_an_arm_says_nothing():
    found = estimate([0.5], [0.1, 0.2], paired=False)
    assert (found.low, found.high, found.p_value) == (-np.inf, np.inf, 1.0)


@pytest.mark.parametrize("paired", [True, False])
def test_the_interval_is_the_wider_of_both(paired):
    """Runs agree on the mean but items do not, so only the bootstrap sees the variance."""
    rng = np.random.default_rng(0)
    control = np.tile(rng.normal(0, 1, 100), (4, 1))
    gains = rng.normal(0.05, 1, 100)
    treated = control + gains
    found = estimate(treated.mean(axis=1), control.mean(axis=1), treated, control, paired=paired)
    error = gains.std() / 10
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert found.p_value == pytest.approx(
        2 * scipy.stats.norm.sf(abs(gains.mean()) / error), abs=0.05
    )


def test_holm_by_hand():
    # Sorted: 0.01 x 4, 0.015 x 3, 0.02 x 2 (raised to the one before), 0.8.
    assert holm([0.02, 0.01, 0.8, 0.015]) == pytest.approx([0.045, 0.04, 0.8, 0.045])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.02, 0.03, LARGE_GAIN),
        (0.01, 0.03, GAIN),
        (0.005, 0.015, SMALL_GAIN),
        (-0.01, 0.01, NONE),
        (-0.01, 0.03, UNDECIDED),
        (-0.03, 0.01, UNDECIDED),
        (-0.015, -0.005, SMALL_HARM),
        (-0.03, -0.01, HARM),
        (-0.03, -0.02, LARGE_HARM),
        (-np.inf, np.inf, UNDECIDED),
    ],
)
def test_labels_by_hand(low, high, expected):
    assert label(Estimate((), (low + high) / 2, low, high, 1.0), margin=0.02) == expected


def test_the_bootstrap_covers_a_known_difference_where_each_run_has_its_own_items():
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(150):
        treated, control = [], []
        for number in rng.integers(20, 60, 12):
            control.append(rng.normal(0, 0.3, number))
            treated.append(control[-1] + 0.05 + rng.normal(0, 0.04) + rng.normal(0, 0.3, number))
        means = bootstrap(treated, control, paired=True, own_items=True, num_resamples=300)
        covered.append(np.percentile(means, 2.5) <= 0.05 <= np.percentile(means, 97.5))
    assert 0.9 <= np.mean(covered) <= 0.99


def test_primary_and_secondary_claims_are_registered_and_few():
    registered = {key_of(contrast) for contrast in CONTRASTS}
    assert len(registered) == len(CONTRASTS)
    assert registered >= {*PRIMARY, *SECONDARY}
    assert not {*PRIMARY} & {*SECONDARY}
    assert len(PRIMARY) <= 12
