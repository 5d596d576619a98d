"""The tasks that are known by name (`tasks.toml`), and the numbers of DiHT's suite and DataComp's.

Metrics are those that DataComp reports: its `tasklist.yml`, `eval_utils` and `aggregate_scores.py`
(arXiv 2304.14108; github.com/mlfoundations/datacomp), without FairFace and UTKFace, which have no
main metric. A task counts for DataComp's means as it measures it: on the folder of its download,
and a retrieval on the bare captions. CIFAR-10 and others are in none but the mean of all.
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
BENCHMARK_PREFIX = "clip_benchmark:"  # of a source in CLIP_benchmark's layout
CAPTION_SLOT = "{caption}"

# Where DataComp's own download makes no folder: what it takes from Hugging Face's cache instead.
_OTHER_FOLDERS = {
    "retrieval/flickr_1k_test_image_text_retrieval": "wds_flickr30k",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": "wds_mscoco_captions",
    "misc/winogavil": "winogavil",
}


@dataclasses.dataclass(frozen=True)
class SuiteEntry:
    """A task by name."""

    split: str  # what of the data set is evaluated
    kind: str = CLASSIFICATION  # of `protocols.registry.PROTOCOLS`
    source: str = NO_SOURCE  # of `sources.registry`
    # How users give a source, what follows `NAME=`, where there is none; where empty, the folder of
    # DataComp's download.
    form: str = ""
    # The first is the one that DiHT, or DataComp, reports.
    metrics: Sequence[str] = ("top1", "top5", "mean_per_class")
    numbers: int = 0  # how many of the 29 it gives
    datacomp: str = ""  # its key in DataComp's `tasklist.yml`, such as "vtab/dtd"
    # As `base.parse_templates` takes them; the kind's own where None.
    templates: str | Sequence[str] | None = None
    # As `base.read_class_names` takes them; they come with the data where None.
    class_names: str | Sequence[str] | None = None
    tfds_class_names: str | None = None  # better ones for a TFDS source, in the order of its labels
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the protocol


def datacomp_folder(key: str) -> str:
    """The folder of a task below that of DataComp's download, such as "wds_vtab-dtd_test"."""
    made = f"wds_{key.removeprefix('fairness/').replace('/', '-')}_test"
    return _OTHER_FOLDERS.get(key, made)


_tables = tomllib.loads(pathlib.Path(__file__).with_name("tasks.toml").read_text("utf-8"))
SUITE: dict[str, SuiteEntry] = {
    name: SuiteEntry(**fields) for name, fields in _tables["suite"].items()
}
TASKS_BY_NAME: dict[str, SuiteEntry] = SUITE | {
    name: SuiteEntry(**fields) for name, fields in _tables["benchmarks"].items()
}
# DataComp's key -> the task here.
DATACOMP: dict[str, str] = {
    entry.datacomp: name for name, entry in TASKS_BY_NAME.items() if entry.datacomp
}

# A number of a suite: the mean of some metrics of a task.
Number = tuple[str, Sequence[str]]


def main_metrics(task: str) -> Sequence[str]:
    """The metrics of a task whose mean is its number for DataComp (and for CLIP_benchmark)."""
    entry = TASKS_BY_NAME[task]
    return entry.metrics if entry.kind == RETRIEVAL else entry.metrics[:1]


def _name_means(
    prefix: str, groups: Mapping[str, list[Number]], everything: list[Number]
) -> dict[str, list[Number]]:
    means = {f"{prefix}mean of {len(numbers)} {name}": numbers for name, numbers in groups.items()}
    return {**means, f"{prefix}mean of all {len(everything)}": everything}


# The name of each mean -> its numbers: those that DiHT's suite counts, and DataComp's.
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
