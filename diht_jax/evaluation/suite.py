"""The built-in tasks (`tasks.toml`), and the numbers that DiHT's suite and DataComp average.

Main metrics are those of DataComp's `tasklist.yml`, `eval_utils` and `aggregate_scores.py` (arXiv
2304.14108; github.com/mlfoundations/datacomp), without FairFace and UTKFace, which have no main
metric. A task counts for DataComp's means only if measured in the same way: on the folder of its
download, and retrieval with bare captions. Some, such as CIFAR-10, only count for the mean of all.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

CLASSIFICATION, MULTILABEL, RETRIEVAL = "classification", "multilabel", "retrieval"
NO_SOURCE = ""
BENCHMARK_PREFIX = "clip_benchmark:"  # prefix of a source in CLIP_benchmark's layout
CAPTION_SLOT = "{caption}"

# Folders for data that DataComp's download script leaves in Hugging Face's cache.
_OTHER_FOLDERS = {
    "retrieval/flickr_1k_test_image_text_retrieval": "wds_flickr30k",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": "wds_mscoco_captions",
    "misc/winogavil": "winogavil",
}


@dataclasses.dataclass(frozen=True)
class SuiteEntry:
    """The definition of a built-in task."""

    split: str  # which part of the data set is evaluated
    kind: str = CLASSIFICATION  # a key of `protocols.registry.PROTOCOLS`
    source: str = NO_SOURCE  # for `sources.registry`
    # For a task without a default source: what users write after `NAME=`. Empty means the folder of
    # DataComp's download.
    form: str = ""
    # The first is the one that DiHT or DataComp reports.
    metrics: Sequence[str] = ("top1", "top5", "mean_per_class")
    numbers: int = 0  # how many of DiHT's 29 numbers it contributes
    datacomp: str = ""  # key in DataComp's `tasklist.yml`, such as "vtab/dtd"
    # In a form that `base.parse_templates` accepts; None uses the defaults of the kind.
    templates: str | Sequence[str] | None = None
    # In a form that `base.read_class_names` accepts; None takes them from the data.
    class_names: str | Sequence[str] | None = None
    tfds_class_names: str | None = None  # better names for a TFDS source, in its label order
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for the protocol


def datacomp_folder(key: str) -> str:
    """Returns a task's folder name in DataComp's download, such as "wds_vtab-dtd_test"."""
    made = f"wds_{key.removeprefix('fairness/').replace('/', '-')}_test"
    return _OTHER_FOLDERS.get(key, made)


_tables = tomllib.loads(pathlib.Path(__file__).with_name("tasks.toml").read_text("utf-8"))
SUITE: dict[str, SuiteEntry] = {
    name: SuiteEntry(**fields) for name, fields in _tables["suite"].items()
}
TASKS_BY_NAME: dict[str, SuiteEntry] = SUITE | {
    name: SuiteEntry(**fields) for name, fields in _tables["benchmarks"].items()
}
# Maps DataComp's keys to built-in task names.
DATACOMP: dict[str, str] = {
    entry.datacomp: name for name, entry in TASKS_BY_NAME.items() if entry.datacomp
}

# A number of a suite: a task, and its metrics that are averaged.
Number = tuple[str, Sequence[str]]


def main_metrics(task: str) -> Sequence[str]:
    """Returns the metrics whose mean is the task's number in DataComp and CLIP_benchmark."""
    entry = TASKS_BY_NAME[task]
    return entry.metrics if entry.kind == RETRIEVAL else entry.metrics[:1]


def _name_means(
    prefix: str, groups: Mapping[str, list[Number]], everything: list[Number]
) -> dict[str, list[Number]]:
    means = {f"{prefix}mean of {len(numbers)} {name}": numbers for name, numbers in groups.items()}
    return {**means, f"{prefix}mean of all {len(everything)}": everything}


# Maps the name of each mean to its numbers: those counted by DiHT's suite and by DataComp.
_counted: dict[str, list[Number]] = {
    group: [
        (name, (metric,))
        for name, entry in SUITE.items()
        if entry.kind in kinds
        for metric in entry.metrics[: entry.numbers]
    ]
    for group, kinds in {
        "classification": (CLASSIFICATION, MULTILABEL, "binary"),
        "retrieval": (RETRIEVAL, "winoground"),
        "VQA": ("entailment", "vqa"),
    }.items()
}
SUITE_MEANS = _name_means("", _counted, list(itertools.chain(*_counted.values())))

_SHIFTS = ("imagenet_sketch", "imagenetv2", "imagenet-a", "imagenet-o", "imagenet-r", "objectnet")
_number_of: dict[str, Number] = {key: (task, main_metrics(task)) for key, task in DATACOMP.items()}
_datacomp_groups = {
    "ImageNet shifts": [_number_of[key] for key in _SHIFTS],
    "VTAB": [n for key, n in _number_of.items() if key.startswith("vtab/") or key == "sun397"],
    "retrieval": [n for key, n in _number_of.items() if key.startswith(("retrieval/", "misc/"))],
}
DATACOMP_MEANS = _name_means("DataComp: ", _datacomp_groups, list(_number_of.values()))
