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
