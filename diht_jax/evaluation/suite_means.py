"""Means over the numbers of DiHT's suite: 17 classifications, 10 retrievals, 2 on questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diht_jax.evaluation.suite import SUITE

_GROUPS = {
    "classification": ("classification", "multilabel", "binary"),
    "retrieval": ("retrieval", "winoground"),
    "VQA": ("entailment", "vqa"),
}


def suite_numbers() -> dict[str, list[tuple[str, str]]]:
    """The (task, metric) pairs that the suite counts, by the name of their mean."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for group, kinds in _GROUPS.items():
        numbers = [
            (name, metric)
            for name, entry in SUITE.items()
            if entry.kind in kinds
            for metric in entry.metrics[: entry.numbers]
        ]
        groups[f"mean of {len(numbers)} {group}"] = numbers
    everything = [number for numbers in groups.values() for number in numbers]
    return {**groups, f"mean of all {len(everything)}": everything}


def suite_means(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, str]]:
    """The means over what was measured.

    Args:
        results: of the tasks, as in a results file.

    Returns:
        Name, value, and how many numbers are missing; without the groups of which all are.
    """
    metrics = {result["task"]: result["metrics"] for result in results}
    found = []
    for name, numbers in suite_numbers().items():
        present = [metrics[task][m] for task, m in numbers if m in metrics.get(task, {})]
        if present:
            missing = describe_missing(len(numbers) - len(present))
            found.append((name, sum(present) / len(present), missing))
    return found


def describe_missing(number: int) -> str:
    """ "3 missing", or nothing."""
    return f"{number} missing" if number else ""
