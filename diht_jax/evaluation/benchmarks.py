"""DataComp's folders as tasks, and the means over DiHT's suite and over DataComp's groups.

Metrics are those that DataComp reports: its `tasklist.yml`, `eval_utils` and `aggregate_scores.py`
(arXiv 2304.14108; github.com/mlfoundations/datacomp), without FairFace and UTKFace, which have no
main metric. A task counts for DataComp's means as it measures it: on the folder of its download,
and a retrieval on the bare captions. CIFAR-10 and others are in none but the mean of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from diht_jax.evaluation.prompts import CAPTION_SLOT
from diht_jax.evaluation.suite import (
    CLASSIFICATION,
    DATACOMP,
    MULTILABEL,
    RETRIEVAL,
    SUITE,
    TASKS_BY_NAME,
    datacomp_folder,
)
from diht_jax.storage.files import exists, join

_DATACOMP, _FOLDER = "datacomp:", "clip_benchmark:"
# The other benchmarks measure with these, where a task here has options of its own.
_OPTIONS = {RETRIEVAL: "?caption_template={caption}", MULTILABEL: "?interpolation=all"}


def main_metrics(task: str) -> tuple[str, ...]:
    """The metrics of a task whose mean is its number for DataComp (and for CLIP_benchmark)."""
    entry = TASKS_BY_NAME[task]
    return entry.metrics if entry.kind == RETRIEVAL else entry.metrics[:1]


def datacomp_source(theirs: str, folder: str) -> str:
    """The source of one of DataComp's tasks in a folder, with the options of its measure."""
    kind = TASKS_BY_NAME[DATACOMP[theirs]].kind
    if kind == "winogavil":
        return f"{folder}/winogavil_dataset.csv"
    return f"{_FOLDER}{folder}{_OPTIONS.get(kind, '')}"


def expand_datacomp(text: str) -> list[str]:
    """The tasks of "datacomp:DIR" whose folders are there, as texts of `parse_tasks`.

    Any other text is the only one of its list.

    Raises:
        ValueError: no folder is there.
    """
    if not text.startswith(_DATACOMP):
        return [text]
    root = text.removeprefix(_DATACOMP)
    texts, missing = [], []
    for theirs, ours in DATACOMP.items():
        folder = join(root, datacomp_folder(theirs))
        source = datacomp_source(theirs, folder)
        is_csv = source.endswith(".csv")
        if exists(source if is_csv else join(folder, "test", "nshards.txt")):
            texts.append(f"{ours}={source}")
        else:
            missing.append(datacomp_folder(theirs))
    if not texts:
        raise ValueError(
            f"task '{text}': none of DataComp's folders is in '{root}', such as {missing[0]}; "
            "expected what its download_evalsets.py writes (options belong to single tasks)"
        )
    if missing:
        logging.warning("%s: %d folders are missing: %s", text, len(missing), ", ".join(missing))
    return texts


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
        result = result or {}
        metrics = result.get("metrics", {})
        if any(name not in metrics for name in self.metrics):
            return None
        if self.is_datacomp and result.get("kind") == CLASSIFICATION:
            if not result.get("source", "").startswith(_FOLDER):
                return None
        elif self.is_datacomp:
            template = result.get("protocol", {}).get("caption_template", CAPTION_SLOT)
            if template != CAPTION_SLOT:
                return None
        return sum(metrics[name] for name in self.metrics) / len(self.metrics)


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over the numbers of a group that all of some results have.

    Attributes:
        name: of the mean.
        numbers: that all have.
        values: of each result.
        missing: such as "3 missing"; empty where nothing is.
    """

    name: str
    numbers: list[Number]
    values: list[float]
    missing: str


def suite_means(by_task: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Mean]:
    """The means over DiHT's suite; over DataComp's where one of the tasks is in its list alone.

    Args:
        by_task: for each of the results files the results of its tasks, by name.

    Returns:
        Without the groups of which no number is there.
    """
    groups = suite_numbers()
    tasks = {task for results in by_task for task in results}
    if any(task in DATACOMP.values() and task not in SUITE for task in tasks):
        groups |= datacomp_numbers()
    means = []
    for name, numbers in groups.items():
        values = {n: [n.value(results.get(n.task)) for results in by_task] for n in numbers}
        present = [number for number in numbers if None not in values[number]]
        if present:
            missing = len(numbers) - len(present)
            found = np.mean([values[number] for number in present], axis=0).tolist()
            means.append(Mean(name, present, found, f"{missing} missing" if missing else ""))
    return means


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
