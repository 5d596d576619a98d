"""Comparison of results with each other or with published numbers, with confidence intervals.

A difference B - A has an interval if both files hold the resamples of the same images. Both models
are then measured on the same draws, so variation that they share cancels (the paired bootstrap).
The interval is not corrected for multiple comparisons: among 20 differences without any true effect
one is expected to look significant.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diht_jax.evaluation.results import (
    LEVEL,
    describe_model,
    format_value,
    metric_of,
    paired_differences,
    percentile_interval,
    suite_means,
)
from diht_jax.evaluation.suite import TASKS_BY_NAME, Number
from diht_jax.terminal import format_table

# Names of the compared results; also limits how many a table shows.
LETTERS = "ABCDEFGH"
_MARK = "*"

# Zero-shot results of the released DiHT weights, in percent, from the official repository
# (facebookresearch/diht): top-1 on ImageNet, recall at 1 on COCO and Flickr30K.
_PUBLISHED_METRICS = (
    ("imagenet", "top1"),
    ("coco_retrieval", "t2i_r1"),
    ("coco_retrieval", "i2t_r1"),
    ("flickr30k_retrieval", "t2i_r1"),
    ("flickr30k_retrieval", "i2t_r1"),
)
PUBLISHED_PERCENT = {
    "diht_vitb32_224px": (68.0, 40.6, 59.3, 68.6, 84.4),
    "diht_vitb16_224px": (72.2, 43.3, 60.3, 72.9, 89.8),
    "diht_vitl14_224px": (77.0, 48.0, 65.1, 76.7, 92.0),
    "diht_vitl14_336px": (77.9, 49.3, 65.3, 78.2, 91.1),
}


def format_comparison(*results: dict[str, Any]) -> str:
    """Formats a table of two or more results, their differences to the first, and the suite means.

    Tasks and metrics that a result lacks show a dash. A mean is over the numbers that all results
    have. Below the table, a note names each task that was measured differently (other prompts,
    another number of images).
    """
    letters = LETTERS[: len(results)]
    by_task = [{result["task"]: result for result in r["results"]} for r in results]
    rows, notes = [], []
    for task in dict.fromkeys(name for tasks in by_task for name in tasks):
        rows += _compare_metrics(task, [tasks.get(task, {}) for tasks in by_task])
        found = [tasks[task] for tasks in by_task if task in tasks]
        notes += _differing_protocols(task, found)
        draws = [result["resamples"]["draws"] for result in found if "resamples" in result]
        if any(other != draws[0] for other in draws):
            why = "was resampled from other images, or otherwise: it has no interval"
            notes.append(f"note: '{task}' {why}")
    rows += _compare_means(by_task)
    header = ["task", "metric", *letters]
    for letter in letters[1:]:
        header += [f"{letter} - {letters[0]}", f"{LEVEL:.0%} interval"]
    empty = [i for i in range(len(letters) + 3, len(header), 2) if not any(r[i] for r in rows)]
    kept = [i for i in range(len(header)) if i not in empty]
    cells = [[row[i] for i in kept] for row in rows]
    table = format_table([header[i] for i in kept], cells, "ll".ljust(len(kept), "r"))
    if any(_MARK in cell for row in rows for cell in row[len(letters) + 2 :]):
        notes.insert(0, f"{_MARK} beyond chance: 0 is outside of the paired interval")
    names = [f"{letter}: {describe_model(r)}" for letter, r in zip(letters, results, strict=True)]
    return "\n".join([*names, table, *notes])


def _compare_metrics(task: str, results: Sequence[dict[str, Any]]) -> list[list[str]]:
    rows = []
    measured = [result.get("metrics", {}) for result in results]
    for name in dict.fromkeys(name for metrics in measured for name in metrics):
        with_it = next(r for r, x in zip(results, measured, strict=True) if name in x)
        metric = metric_of(with_it, name)
        cells = [format_value(metric.unit, x[name]) if name in x else "-" for x in measured]
        for result, values in zip(results[1:], measured[1:], strict=True):
            if name not in values or name not in measured[0]:
                cells += ["-", ""]
                continue
            samples = paired_differences(results[0], result, name)
            cells += _difference_cells(metric.unit, values[name] - measured[0][name], samples)
        rows.append(["" if rows else task, metric.label, *cells])
    return rows


def _compare_means(by_task: Sequence[Mapping[str, dict[str, Any]]]) -> list[list[str]]:
    """Returns a row for each suite mean to which all results contribute."""
    rows = []
    for mean in suite_means(by_task):
        label = f"{mean.name} ({mean.missing})" if mean.missing else mean.name
        cells = [format_value("share", value) for value in mean.values]
        for tasks, value in zip(by_task[1:], mean.values[1:], strict=True):
            samples = _mean_samples(by_task[0], tasks, mean.numbers)
            cells += _difference_cells("share", value - mean.values[0], samples)
        rows.append(["" if rows else "suite", label, *cells])
    return rows


def _mean_samples(
    first: Mapping[str, dict[str, Any]],
    second: Mapping[str, dict[str, Any]],
    numbers: Sequence[Number],
) -> np.ndarray | None:
    """Returns the resampled differences of a suite mean; None if a number cannot be paired."""
    differences = []
    for task, metrics in numbers:
        found = [paired_differences(first[task], second[task], metric) for metric in metrics]
        paired = [samples for samples in found if samples is not None]
        if len(paired) < len(found):
            return None
        differences.append(np.mean(paired, axis=0))
    return np.mean(differences, axis=0)


def _difference_cells(unit: str, value: float, samples: np.ndarray | None) -> list[str]:
    """Formats the difference and its interval, which is empty without resamples."""
    difference = _format_difference(unit, value)
    if samples is None:
        return [difference, ""]
    low, high = percentile_interval(samples)
    mark = _MARK if low > 0 or high < 0 else " "
    texts = [_format_difference(unit, bound) for bound in (low, high)]
    return [difference, f"{' to '.join(texts)} {mark}"]


def _format_difference(unit: str, value: float) -> str:
    digits = {"share": 2, "score": 4, "rank": 1}[unit]
    value = 100 * value if unit == "share" else value
    # Adding 0.0 turns a -0.0 from rounding into 0.0.
    return f"{round(value, digits) + 0.0:+,.{digits}f}"


def _differing_protocols(task: str, results: Sequence[dict[str, Any]]) -> list[str]:
    first, *others = results
    notes = []
    for other, field in itertools.product(others, ("protocol", "counts")):
        for key, value in first[field].items():
            if value != other[field].get(key):
                texts = [json.dumps(x, ensure_ascii=False) for x in (value, other[field].get(key))]
                one, two = (x if len(x) <= 60 else f"{x[:57]}..." for x in texts)
                notes.append(f"note: '{task}' differs in {key}: {one} and {two}")
    return notes


def published_results(model: str) -> dict[str, Any]:
    """Returns the published numbers of a model of `PUBLISHED_PERCENT` as a results dictionary."""
    results: dict[str, dict[str, Any]] = {}
    for (task, metric), percent in zip(_PUBLISHED_METRICS, PUBLISHED_PERCENT[model], strict=True):
        kind = TASKS_BY_NAME[task].kind
        empty = {"task": task, "kind": kind, "metrics": {}, "protocol": {}, "counts": {}}
        results.setdefault(task, empty)["metrics"][metric] = percent / 100
    return {"model": f"{model}, as published", "results": list(results.values())}
