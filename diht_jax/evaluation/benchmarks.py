"""Tasks of other benchmarks: DataComp's 38 by their names there, and CLIP_benchmark's sets.

All but WinoGAViL take a folder in CLIP_benchmark's layout (`sources/benchmark_folder`), as
DataComp's `download_evalsets.py` writes one for each, and as they are offered on
huggingface.co/clip-benchmark. The folder brings class names and prompts, and they count before
those that stand here, which are CLIP_benchmark's and serve for other sources. Metrics are those
that DataComp reports: its `tasklist.yml`, `eval_utils` and `aggregate_scores.py` (arXiv 2304.14108;
github.com/mlfoundations/datacomp), without FairFace and UTKFace, which have no main metric.

Also here: the means over the numbers of DiHT's suite (17, 10 and 2), and over DataComp's by its
groups, with CIFAR-10 and others in none but the mean of all. A task counts for DataComp's as it
measures it: on the folder of its download, and a retrieval on the bare captions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from diht_jax.evaluation.prompts import CAPTION_SLOT
from diht_jax.evaluation.suite import (
    BOTH_WAYS,
    CLASSIFICATION,
    IMAGENET,
    MULTILABEL,
    NO_SOURCE,
    PER_CLASS,
    RETRIEVAL,
    SUITE,
    TOP1,
    SuiteEntry,
)
from diht_jax.storage.files import exists, join

_DATACOMP, _FOLDER = "datacomp:", "clip_benchmark:"
_WORST_GROUP = ("worst_group", "top1", "mean_per_class")


def _task(folder: str, split: str, words: str = "", *, names: bool = True, **fields: Any):
    """A task that needs a folder; `words` names the prompts, and class names, of the package."""
    if words:
        fields["templates"] = f"clip_benchmark:{words}"
    if words and names:
        fields["class_names"] = words
    return SuiteEntry(
        **{"kind": CLASSIFICATION, "metrics": TOP1, **fields},
        source=NO_SOURCE,
        split=split,
        numbers=0,
        form=f"clip_benchmark:DIR, DIR being {folder} in CLIP_benchmark's layout",
    )


def _vtab(name: str, images: str, *, names: bool = True) -> SuiteEntry:
    return _task(f"wds_vtab-{name}", f"test of VTAB: {images} images", name, names=names)


BENCHMARK_TASKS: dict[str, SuiteEntry] = {
    "camelyon17": _task(
        "DataComp's wds_wilds-camelyon17_test", "test of WILDS: one hospital, 85,054 patches"
    ),
    "clevr_counts": _task(
        "wds_vtab-clevr_count_all_test", "test of VTAB: 15,000 images", "clevr_count_all"
    ),
    "clevr_distance": _task(
        "wds_vtab-clevr_closest_object_distance_test",
        "test of VTAB: 15,000 images",
        "clevr_closest_object_distance",
    ),
    "diabetic_retinopathy": _vtab("diabetic_retinopathy", "42,670"),
    "dmlab": _vtab("dmlab", "22,735"),
    "dollar_street": _task(
        "DataComp's wds_dollar_street_test",
        "3,503 images of 58 classes; the group is that of incomes",
        metrics=("worst_group_top5", "top5", "top1"),
        options={"group": "0"},
    ),
    "dsprites_orientation": _vtab("dsprites_label_orientation", "73,728", names=False),
    "dsprites_x_position": _vtab("dsprites_label_x_position", "73,728", names=False),
    "dsprites_y_position": _task(
        "wds_vtab-dsprites_label_y_position", "test of VTAB: 73,728 images"
    ),
    "eurosat": _task("wds_vtab-eurosat_test", "test of VTAB: 5,400 images", "eurosat"),
    "fer2013": _task("wds_fer2013", "test: 7,178 images", "fer2013"),
    "fgvc_aircraft": _task(
        "wds_fgvc_aircraft_test",
        "test: 3,333 images of 100 variants",
        "fgvc_aircraft",
        names=False,
        metrics=PER_CLASS,
    ),
    "flickr8k_retrieval": _task(
        "wds_flickr8k",
        "Karpathy and Li's test split: 1,000 images with 5 captions each",
        kind=RETRIEVAL,
        metrics=BOTH_WAYS,
    ),
    "fmow": _task(
        "DataComp's wds_wilds-fmow_test",
        "test of WILDS: 22,108 images of 62 classes; the group is the region",
        metrics=_WORST_GROUP,
        options={"group": "0"},
    ),
    "geode": _task(
        "DataComp's wds_geode_test",
        "12,488 images of 40 classes; the group is the region",
        metrics=_WORST_GROUP,
        options={"group": "0"},
    ),
    "gtsrb": _task("wds_gtsrb_test", "test: 12,630 images", "gtsrb"),
    "imagenet_o": _task(
        "wds_imagenet-o_test",
        "2,000 images; its 200 classes compete",
        templates=IMAGENET,
        class_names=IMAGENET,
        options={"candidates": "with_images"},
    ),
    "iwildcam": _task(
        "DataComp's wds_wilds-iwildcam_test",
        "test of WILDS: 42,791 images of 182 classes",
        metrics=("f1_macro", "top1", "mean_per_class"),
        options={"f1": "macro"},
    ),
    "kitti_distance": _task(
        "wds_vtab-kitti_closest_vehicle_distance_test",
        "test of VTAB: 711 images",
        "kitti_closest_vehicle_distance",
    ),
    "mnist": _task("wds_mnist_test", "test: 10,000 images", "mnist"),
    "pcam": _task("wds_vtab-pcam_test", "test: 32,768 images", "pcam"),
    "rendered_sst2": _task(
        "wds_renderedsst2_test", "test: 1,821 images", "renderedsst2", names=False
    ),
    "resisc45": _task(
        "wds_vtab-resisc45_test", "test of VTAB: 6,300 images", "resisc45", names=False
    ),
    "smallnorb_azimuth": _vtab("smallnorb_label_azimuth", "12,150", names=False),
    "smallnorb_elevation": _vtab("smallnorb_label_elevation", "12,150", names=False),
    "svhn": _task("wds_vtab-svhn_test", "test: 26,032 images", "svhn"),
    "voc2007_objects": _task(
        "wds_voc2007_test",
        "test: the 14,976 objects of VOC 2007, each cut out",
        "voc2007",
        names=False,
    ),
    "winogavil": SuiteEntry(
        "winogavil",
        NO_SOURCE,
        ("jaccard_10_12", "jaccard"),
        split="test: 3,563 games",
        numbers=0,
        form="DIR/winogavil_dataset.csv, with DIR/winogavil_images next to it",
    ),
}

TASKS_BY_NAME: dict[str, SuiteEntry] = {**SUITE, **BENCHMARK_TASKS}

# DataComp's key -> the task here, in the order of its `tasklist.yml`.
DATACOMP: dict[str, str] = {
    "vtab/caltech101": "caltech101",
    "cifar10": "cifar10",
    "vtab/cifar100": "cifar100",
    "vtab/clevr_count_all": "clevr_counts",
    "vtab/clevr_closest_object_distance": "clevr_distance",
    "country211": "country211",
    "vtab/dtd": "dtd",
    "vtab/eurosat": "eurosat",
    "fgvc_aircraft": "fgvc_aircraft",
    "food101": "food101",
    "gtsrb": "gtsrb",
    "imagenet1k": "imagenet",
    "imagenet_sketch": "imagenet_sketch",
    "imagenetv2": "imagenet_v2",
    "imagenet-a": "imagenet_a",
    "imagenet-o": "imagenet_o",
    "imagenet-r": "imagenet_r",
    "vtab/kitti_closest_vehicle_distance": "kitti_distance",
    "mnist": "mnist",
    "objectnet": "objectnet",
    "vtab/flowers": "flowers102",
    "vtab/pets": "oxford_pets",
    "voc2007": "voc2007_objects",
    "vtab/pcam": "pcam",
    "renderedsst2": "rendered_sst2",
    "vtab/resisc45": "resisc45",
    "cars": "stanford_cars",
    "stl10": "stl10",
    "sun397": "sun397",
    "vtab/svhn": "svhn",
    "retrieval/flickr_1k_test_image_text_retrieval": "flickr30k_retrieval",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": "coco_retrieval",
    "misc/winogavil": "winogavil",
    "wilds/iwildcam": "iwildcam",
    "wilds/camelyon17": "camelyon17",
    "wilds/fmow": "fmow",
    "fairness/dollar_street": "dollar_street",
    "fairness/geode": "geode",
}

# Where DataComp's own download makes no folder: what it takes from Hugging Face's cache instead.
_OTHER_FOLDERS = {
    "retrieval/flickr_1k_test_image_text_retrieval": "wds_flickr30k",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": "wds_mscoco_captions",
    "misc/winogavil": "winogavil",
}
# The other benchmarks measure with these, where a task here has options of its own.
_OPTIONS = {RETRIEVAL: "?caption_template={caption}", MULTILABEL: "?interpolation=all"}


def main_metrics(task: str) -> tuple[str, ...]:
    """The metrics of a task whose mean is its number for DataComp (and for CLIP_benchmark)."""
    entry = TASKS_BY_NAME[task]
    return entry.metrics if entry.kind == RETRIEVAL else entry.metrics[:1]


def datacomp_folder(theirs: str) -> str:
    """The folder of a task below that of DataComp's download, such as "wds_vtab-dtd_test"."""
    made = f"wds_{theirs.removeprefix('fairness/').replace('/', '-')}_test"
    return _OTHER_FOLDERS.get(theirs, made)


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
