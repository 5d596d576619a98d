"""Bootstrap intervals, against the normal approximation and against resampling by hand."""

import numpy as np
import pytest

from diht_jax.evaluation.results import (
    describe_samples,
    paired_differences,
    percentile_interval,
    resample,
)


def test_interval_of_a_share_is_that_of_the_binomial():
    hits = np.arange(400) < 120
    found = resample(lambda counts: {"share": (counts * hits).sum() / 400}, 400)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 400)
    interval = percentile_interval(found["share"])
    assert interval == pytest.approx([0.3 - half, 0.3 + half], abs=0.006)


def test_a_paired_difference_has_the_interval_of_mcnemar():
    # 1,000 images: both right on 600, only A on 30, only B on 60.
    first, second = np.arange(1000) < 630, (np.arange(1000) < 600) | (np.arange(1000) >= 940)

    def measured(hits, seed=0, items="x"):
        samples = resample(
            lambda counts: {"top1": (counts * hits).sum() / counts.sum()}, 1000, seed=seed
        )
        return {"resamples": describe_samples(samples, items, 1000, seed)}

    a, b = measured(first), measured(second)
    differences = paired_differences(a, b, "top1")
    low, high = percentile_interval(differences)
    # The variance of the paired difference is (30 + 60 - 30^2 / 1000) / 1000^2.
    half = 1.96 * np.sqrt(90 - 0.9) / 1000
    assert [low, high] == pytest.approx([0.03 - half, 0.03 + half], abs=0.0025)
    assert low > 0  # while the intervals of A and of B overlap by far
    for other in (measured(second, seed=1), measured(second, items="y"), {}):
        assert paired_differences(a, other, "top1") is None
    assert paired_differences(a, b, "top5") is None
