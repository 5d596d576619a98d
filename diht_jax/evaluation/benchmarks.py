"""DataComp's folders as tasks, and the means over DiHT's suite and over DataComp's groups.

Metrics are those that DataComp reports: its `tasklist.yml`, `eval_utils` and `aggregate_scores.py`
(arXiv 2304.14108; github.com/mlfoundations/datacomp), without FairFace and UTKFace, which have no
main metric. A task counts for DataComp's means as it measures it: on the folder of its download,
and a retrieval on the bare captions. CIFAR-10 and others are in none but the mean of all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
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
        kind, folder = TASKS_BY_NAME[ours].kind, join(root, datacomp_folder(theirs))
        source = f"{_FOLDER}{folder}{_OPTIONS.get(kind, '')}"
        needed = join(folder, "test", "nshards.txt")
        if kind == "winogavil":
            source = needed = f"{folder}/winogavil_dataset.csv"
        if exists(needed):
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


# A number of a suite: the mean of some metrics of a task.
Number = tuple[str, tuple[str, ...]]


def _group_suite() -> dict[str, list[Number]]:
    """The numbers that DiHT's suite counts, by the name of their mean."""
    groups: dict[str, list[Number]] = {}
    for group, kinds in {
        "classification": (CLASSIFICATION, MULTILABEL, "binary"),
        "retrieval": (RETRIEVAL, "winoground"),
        "VQA": ("entailment", "vqa"),
    }.items():
        numbers: list[Number] = [
            (name, (metric,))
            for name, entry in SUITE.items()
            if entry.kind in kinds
            for metric in entry.metrics[: entry.numbers]
        ]
        groups[f"mean of {len(numbers)} {group}"] = numbers
    everything = [number for numbers in groups.values() for number in numbers]
    return {**groups, f"mean of all {len(everything)}": everything}


def _group_datacomp() -> dict[str, list[Number]]:
    """DataComp's numbers, by the name of their mean."""
    groups: dict[str, Iterable[str]] = {
        "ImageNet shifts": _SHIFTS,
        "VTAB": (name for name in DATACOMP if name.startswith("vtab/") or name == "sun397"),
        "retrieval": (name for name in DATACOMP if name.startswith(("retrieval/", "misc/"))),
        "all": DATACOMP,
    }
    found = {
        group: [(DATACOMP[name], main_metrics(DATACOMP[name])) for name in names]
        for group, names in groups.items()
    }
    everything = found.pop("all")
    means = {f"DataComp: mean of {len(found[group])} {group}": found[group] for group in found}
    return {**means, f"DataComp: mean of all {len(everything)}": everything}


_SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
SUITE_MEANS, DATACOMP_MEANS = _group_suite(), _group_datacomp()


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
    tasks = set().union(*by_task)
    if TASKS_BY_NAME.keys().isdisjoint(tasks):
        return []
    has_others = not tasks.isdisjoint(set(DATACOMP.values()) - set(SUITE))
    means = []
    for name, numbers in (SUITE_MEANS | DATACOMP_MEANS if has_others else SUITE_MEANS).items():
        present, found = [], []
        for task, metrics in numbers:
            one = [_value(results.get(task, {}), metrics, name) for results in by_task]
            if None not in one:
                present.append((task, metrics))
                found.append(one)
        if present:
            missing = len(numbers) - len(present)
            values = np.mean(found, axis=0).tolist()
            means.append(Mean(name, present, values, f"{missing} missing" if missing else ""))
    return means


def _value(result: Mapping[str, Any], metrics: Sequence[str], mean: str) -> float | None:
    """A number for a mean in a task's result; None where it is not there, or measured otherwise."""
    measured = result.get("metrics", {})
    if any(name not in measured for name in metrics):
        return None
    if mean in DATACOMP_MEANS:
        template = result.get("protocol", {}).get("caption_template", CAPTION_SLOT)
        is_folder = result.get("source", "").startswith(_FOLDER)
        is_as_there = (
            is_folder if result.get("kind") == CLASSIFICATION else template == CAPTION_SLOT
        )
        if not is_as_there:
            return None
    return sum(measured[name] for name in metrics) / len(metrics)
