"""Contrasts with what their runs have shown so far."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from benchmarks.lab.experiments import (
    CONTRASTS,
    DESCRIBED,
    EXPERIMENTS,
    Contrast,
    metrics_of,
    seeds_of,
)
from benchmarks.lab.measure import unpack_items
from benchmarks.lab.run import Run, read_result
from benchmarks.lab.statistics import WAITING, Estimate, decide, estimate, holm


@dataclasses.dataclass(frozen=True)
class Row:
    """A contrast with what its runs have shown so far.

    Attributes:
        contrast: which one.
        found: None without a pair of runs.
        seeds: how many pairs there are.
        verdict: of `statistics`.
        means: of the metric, treated and control, over the compared seeds; empty without any.
        corrected: Holm's p; None without a verdict.
    """

    contrast: Contrast
    found: Estimate | None
    seeds: int
    verdict: str
    means: tuple[float, ...] = ()
    corrected: float | None = None


def read_results(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The results of today's experiments by the names of their runs."""
    runs = [Run(e, seed) for e in EXPERIMENTS.values() for seed in range(e.seeds)]
    found = {run.name: read_result(run, folder) for run in runs}
    return {name: result for name, result in found.items() if result is not None}


def judge(results: dict[str, dict[str, Any]]) -> list[Row]:
    """All registered contrasts, with estimates and verdicts where runs are there."""
    rows = [_compare(contrast, results) for contrast in CONTRASTS]
    complete = [row.verdict != WAITING for row in rows]
    p_values = [
        row.found.p_value if is_complete else 1.0
        for row, is_complete in zip(rows, complete, strict=True)
    ]
    return [
        dataclasses.replace(row, corrected=p) if is_complete else row
        for row, is_complete, p in zip(rows, complete, holm(p_values), strict=True)
    ]


def describe(results: dict[str, dict[str, Any]]) -> list[Row]:
    """The differences that were not registered; they have no verdict."""
    return [
        dataclasses.replace(_compare(contrast, results), verdict=WAITING) for contrast in DESCRIBED
    ]


def _compare(contrast: Contrast, results: dict[str, dict[str, Any]]) -> Row:
    metrics = metrics_of(contrast)
    pairs = []
    for seed in range(seeds_of(contrast)):
        names = [f"{name}_seed{seed}" for name in (contrast.treated, contrast.control)]
        if all(name in results for name in names):
            pairs.append([results[name] for name in names])
    if not pairs:
        return Row(contrast, None, 0, WAITING)
    values = [[pair[i]["metrics"][metrics[i]] for pair in pairs] for i in (0, 1)]
    items = [[_items(pair[i], metrics[i]) for pair in pairs] for i in (0, 1)]
    found = estimate(contrast, *values, *items)
    is_complete = len(pairs) == seeds_of(contrast)
    verdict = decide(contrast, found) if is_complete else WAITING
    return Row(contrast, found, len(pairs), verdict, tuple(float(np.mean(each)) for each in values))


def _items(result: dict[str, Any], metric: str) -> np.ndarray:
    """Each test item's result, the mean of its lists: a scene has one for each direction."""
    return sum(map(unpack_items, result["items"][metric])) / len(result["items"][metric])
