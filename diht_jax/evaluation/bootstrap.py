"""Confidence intervals by resampling what was measured.

Numbers only: the protocol knows how a metric follows from how often each item was drawn.
"""

from __future__ import annotations

import base64
import collections
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diht_jax.terminal import ProgressBar

LEVEL = 0.95
NUM_RESAMPLES = 1000
SEED = 0

_MOMENT_SECS = 2.0


def resample(
    measure: Callable[[np.ndarray], dict[str, float]],
    num_items: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = SEED,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """The bootstrap of Efron (1979): `num_items` draws with replacement, many times.

    The draws depend on the numbers and the seed alone, so that two models, measured on the same
    items, are measured on the same resamples.

    Args:
        measure: metrics from int [num_items], how often each item was drawn.
        num_items: independent items: images, for all protocols here.
        num_resamples: how many times.
        seed: of the draws.
        progress: shows a bar on stderr, where it takes more than a moment.

    Returns:
        Metric -> float64 [num_resamples].
    """
    rng = np.random.default_rng(seed)
    found: dict[str, list[float]] = collections.defaultdict(list)
    for _ in ProgressBar(
        range(num_resamples),
        "bootstrap",
        unit=" resamples",
        disable=not progress,
        delay=_MOMENT_SECS,
    ):
        counts = np.bincount(rng.integers(0, num_items, num_items), minlength=num_items)
        for name, value in measure(counts).items():
            found[name].append(value)
    return {name: np.array(values) for name, values in found.items()}


def percentile_interval(samples: np.ndarray, level: float = LEVEL) -> list[float]:
    """[low, high] with `level` of the resamples between them."""
    tail = 50 * (1 - level)
    return np.percentile(samples, [tail, 100 - tail]).tolist()


def describe_samples(
    samples: dict[str, np.ndarray], items: str, num_items: int, seed: int = SEED
) -> dict[str, Any]:
    """All that pairing two models needs, for the results file; `items` is a digest of the items."""
    return {
        "draws": [items, num_items, len(next(iter(samples.values()))), seed],
        "values": {
            name: base64.b64encode(values.astype("<f4").tobytes()).decode()
            for name, values in samples.items()
        },
    }


def paired_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], name: str
) -> np.ndarray | None:
    """The second result's resamples of a metric minus the first's, float64 [resamples].

    None where one has no resamples, or of other draws or items than the other's.
    """
    described = [result.get("resamples", {}) for result in (first, second)]
    if any(name not in one.get("values", {}) for one in described):
        return None
    if described[0]["draws"] != described[1]["draws"]:
        return None
    one, other = (decode_resamples(result)[name] for result in (first, second))
    return other.astype(float) - one


def decode_resamples(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Metric -> its values in the resamples, float32 [n]; raises ValueError where damaged."""
    described = result.get("resamples", {"values": {}})
    decoded = {
        name: np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        for name, text in described["values"].items()
    }
    if any(len(values) != described["draws"][2] for values in decoded.values()):
        raise ValueError("some resamples are missing")
    return decoded


def describe_bootstrap(num_resamples: int) -> str:
    """Describes the intervals for the results file."""
    return (
        f"{LEVEL:.0%}, percentiles of {num_resamples:,} bootstrap resamples of the images with "
        "all that belongs to them; the classes and the gallery stay as they are"
    )
