"""Confidence intervals by resampling what was measured.

Numbers only: the protocol knows how a metric follows from how often each item was drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diht_jax.progress import ProgressBar

LEVEL = 0.95
NUM_RESAMPLES = 1000

_MOMENT_SECS = 2.0


def bootstrap_intervals(
    measure: Callable[[np.ndarray], dict[str, float]],
    num_items: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, list[float]]:
    """The percentile bootstrap of Efron (1979): `num_items` draws with replacement, many times.

    Args:
        measure: metrics from int [num_items], how often each item was drawn.
        num_items: independent items: images, for all protocols here.
        num_resamples: how many times.
        level: share of the resamples inside the interval.
        seed: of the draws.
        progress: show a bar on stderr, where it takes more than a moment.

    Returns:
        Metric -> [low, high].
    """
    rng = np.random.default_rng(seed)
    measured = [
        measure(np.bincount(rng.integers(0, num_items, num_items), minlength=num_items))
        for _ in ProgressBar(
            range(num_resamples),
            "bootstrap",
            unit=" resamples",
            disable=not progress,
            delay=_MOMENT_SECS,
        )
    ]
    tail = 50 * (1 - level)
    return {
        name: np.percentile([values[name] for values in measured], [tail, 100 - tail]).tolist()
        for name in measured[0]
    }


def describe_bootstrap(num_resamples: int) -> str:
    """For the results file."""
    return (
        f"{LEVEL:.0%}, percentiles of {num_resamples:,} bootstrap resamples of the images with "
        "all that belongs to them; the classes and the gallery stay as they are"
    )
