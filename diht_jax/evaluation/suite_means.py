"""Means over the numbers of DiHT's suite (17, 10 and 2), and of DataComp's (38, by its groups).

DataComp's means are those of its `aggregate_scores.py`, with CIFAR-10 and others in none but the
mean of all. A task counts for them as DataComp measures it: on the folder of its download, and a
retrieval on the bare captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from diht_jax.evaluation.benchmarks import DATACOMP, main_metrics
from diht_jax.evaluation.prompts import CAPTION_SLOT
from diht_jax.evaluation.suite import CLASSIFICATION, SUITE

_GROUPS = {
    "classification": ("classification", "multilabel", "binary"),
    "retrieval": ("retrieval", "winoground"),
    "VQA": ("entailment", "vqa"),
}
_SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
_DATACOMP_GROUPS = {
    "ImageNet shifts": _SHIFTS,
    "VTAB": tuple(name for name in DATACOMP if name.startswith("vtab/") or name == "sun397"),
    "retrieval": tuple(name for name in DATACOMP if name.startswith(("retrieval/", "misc/"))),
}


@dataclasses.dataclass(frozen=True)
class Number:
    """One number of a suite.

    Attributes:
        task: its name.
        metrics: the number is their mean.
        is_datacomp: whether it must have been measured as DataComp does.
    """

    task: str
    metrics: tuple[str, ...]
    is_datacomp: bool = False

    def value(self, result: Mapping[str, Any] | None) -> float | None:
        """The number in a task's result; None where it is not there, or measured otherwise."""
        metrics = (result or {}).get("metrics", {})
        if any(name not in metrics for name in self.metrics):
            return None
        if self.is_datacomp and not _is_measured_as_datacomp(result):
            return None
        return sum(metrics[name] for name in self.metrics) / len(self.metrics)


def suite_numbers() -> dict[str, list[Number]]:
    """The numbers that DiHT's suite counts, by the name of their mean."""
    groups: dict[str, list[Number]] = {}
    for group, kinds in _GROUPS.items():
        numbers = [
            Number(name, (metric,))
            for name, entry in SUITE.items()
            if entry.kind in kinds
            for metric in entry.metrics[: entry.numbers]
        ]
        groups[f"mean of {len(numbers)} {group}"] = numbers
    everything = [number for numbers in groups.values() for number in numbers]
    return {**groups, f"mean of all {len(everything)}": everything}


def datacomp_numbers() -> dict[str, list[Number]]:
    """DataComp's, by the name of their mean."""
    numbers = {name: Number(ours, main_metrics(ours), True) for name, ours in DATACOMP.items()}
    groups = {
        f"DataComp: mean of {len(names)} {group}": [numbers[name] for name in names]
        for group, names in _DATACOMP_GROUPS.items()
    }
    return {**groups, f"DataComp: mean of all {len(numbers)}": list(numbers.values())}


def all_numbers(tasks: Sequence[str]) -> dict[str, list[Number]]:
    """Those of the suite; and DataComp's where one of the tasks is in its list alone."""
    is_datacomp = any(task in DATACOMP.values() and task not in SUITE for task in tasks)
    return {**suite_numbers(), **(datacomp_numbers() if is_datacomp else {})}


def suite_means(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """The means over what was measured.

    Args:
        results: of the tasks, as in a results file.

    Returns:
        Name, value, and how many numbers are missing; without the groups of which all are.
    """
    by_task = {result["task"]: result for result in results}
    found = []
    for name, numbers in all_numbers(list(by_task)).items():
        values = [number.value(by_task.get(number.task)) for number in numbers]
        present = [value for value in values if value is not None]
        if present:
            missing = describe_missing(len(numbers) - len(present))
            found.append((name, sum(present) / len(present), missing))
    return found


def describe_missing(number: int) -> str:
    """Tells how many are missing, such as "3 missing"; nothing for 0."""
    return f"{number} missing" if number else ""


def _is_measured_as_datacomp(result: Mapping[str, Any]) -> bool:
    if result.get("kind") == CLASSIFICATION:
        return result.get("source", "").startswith("clip_benchmark:")
    template = result.get("protocol", {}).get("caption_template", CAPTION_SLOT)
    return template == CAPTION_SLOT
