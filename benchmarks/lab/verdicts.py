"""Estimates and labels of all contrasts, from the runs made so far."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from benchmarks.lab.experiments import (
    CONTRASTS,
    DESCRIBED,
    EXPERIMENTS,
    PRIMARY,
    SECONDARY,
    Contrast,
    is_paired,
    key_of,
    metrics_of,
    runs_of,
)
from benchmarks.lab.measure import unpack_items
from benchmarks.lab.run import Run, read_result
from benchmarks.lab.statistics import WAITING, Estimate, estimate, holm, label

# Ranks: the family of Holm's correction, intervals only, the rest, and chosen after the runs.
FIRST, SECOND, APPENDIX, AFTERWARDS = "primary", "secondary", "appendix", "afterwards"


@dataclasses.dataclass(frozen=True)
class Row:
    """A contrast with the results of its runs so far.

    Attributes:
        contrast: the contrast.
        rank: one of the ranks above.
        found: the estimate; None until all runs are there.
        runs: number of runs of each arm.
        label: a label of `statistics`; "" for contrasts chosen after the runs.
        means: mean metric of treated and control over the compared runs; empty without `found`.
        corrected: Holm's p; None except for primary claims with all runs.
    """

    contrast: Contrast
    rank: str
    found: Estimate | None
    runs: tuple[int, int]
    label: str
    means: tuple[float, ...] = ()
    corrected: float | None = None


def read_results(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads the results of the current experiments, by the names of their runs."""
    runs = [Run(e, seed) for e in EXPERIMENTS.values() for seed in range(e.seeds)]
    found = {run.name: read_result(run, folder) for run in runs}
    return {name: result for name, result in found.items() if result is not None}


def judge(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Returns all registered contrasts, with estimates and labels where all runs are there."""
    rows = [_compare(contrast, results) for contrast in CONTRASTS]
    first = [row for row in rows if row.rank == FIRST]
    p_values = [row.found.p_value if row.found else 1.0 for row in first]
    corrected = dict(zip((row.contrast for row in first), holm(p_values), strict=True))
    return [
        dataclasses.replace(row, corrected=corrected.get(row.contrast)) if row.found else row
        for row in rows
    ]


def describe(results: dict[str, dict[str, Any]]) -> list[Row]:
    """Returns the contrasts that were not registered; they have no label."""
    rows = [_compare(contrast, results) for contrast in DESCRIBED]
    return [dataclasses.replace(row, rank=AFTERWARDS, label="") for row in rows]


def _compare(contrast: Contrast, results: dict[str, dict[str, Any]]) -> Row:
    key = key_of(contrast)
    rank = FIRST if key in PRIMARY else SECOND if key in SECONDARY else APPENDIX
    metrics, paired = metrics_of(contrast), is_paired(contrast)
    arms = [
        {seed: results[name] for seed in range(EXPERIMENTS[arm].seeds)
         if (name := f"{arm}_seed{seed}") in results}
        for arm in (contrast.treated, contrast.control)
    ]  # fmt: skip
    if paired:
        arms = [{seed: arm[seed] for seed in arms[0] if seed in arms[1]} for arm in arms]
    runs = (len(arms[0]), len(arms[1]))
    if runs != runs_of(contrast):
        return Row(contrast, rank, None, runs, WAITING)
    values = [
        [run["metrics"][metric] for run in arm.values()]
        for arm, metric in zip(arms, metrics, strict=True)
    ]
    items = [
        [_items(run, metric) for run in arm.values()]
        for arm, metric in zip(arms, metrics, strict=True)
    ]
    # Each seed holds out other concepts.
    own_items = EXPERIMENTS[contrast.treated].student == "concepts"
    found = estimate(*values, *items, paired=paired, own_items=own_items)
    means = tuple(float(np.mean(each)) for each in values)
    return Row(contrast, rank, found, runs, label(found, contrast.margin), means)


def _items(result: dict[str, Any], metric: str) -> np.ndarray:
    """Returns each test item's result, the mean of its lists: a scene has one per direction."""
    return sum(map(unpack_items, result["items"][metric])) / len(result["items"][metric])
