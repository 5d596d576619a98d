"""Tasks by name beyond DiHT's suite: those of DataComp's 38 and of CLIP_benchmark.

All but WinoGAViL take a folder in CLIP_benchmark's layout (`sources/benchmark_folder`), as
DataComp's `download_evalsets.py` writes one for each, and as they are offered on
huggingface.co/clip-benchmark. The folder brings class names and prompts, and they count before
those that stand here, which are CLIP_benchmark's and serve for other sources. Metrics are those
that DataComp reports: its `tasklist.yml` and `eval_utils` (arXiv 2304.14108;
github.com/mlfoundations/datacomp).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from diht_jax.evaluation import prompts
from diht_jax.evaluation.suite import (
    CLASSIFICATION,
    NO_SOURCE,
    RETRIEVAL,
    SUITE,
    SuiteEntry,
)

_TOP1 = ("top1", "top5", "mean_per_class")
_PER_CLASS = ("mean_per_class", "top1")


def _templates(name: str) -> Callable[[], tuple[str, ...]]:
    return lambda: prompts.benchmark_templates(name)


def _names(name: str) -> Callable[[], tuple[str, ...]]:
    return lambda: prompts.benchmark_class_names(name)


def _task(
    folder: str,
    split: str,
    metrics: tuple[str, ...] = _TOP1,
    *,
    kind: str = CLASSIFICATION,
    words: str = "",
    has_names: bool = True,
    options: Mapping[str, Any] | None = None,
) -> SuiteEntry:
    """A task that needs a folder; `words` names the class names and prompts of the package."""
    return SuiteEntry(
        kind,
        NO_SOURCE,
        metrics,
        split=split,
        numbers=0,
        templates=_templates(words) if words else None,
        class_names=_names(words) if words and has_names else None,
        options=options or {},
        form=f"clip_benchmark:DIR, DIR being {folder} in CLIP_benchmark's layout",
    )


BENCHMARK_TASKS: dict[str, SuiteEntry] = {
    "camelyon17": _task(
        "DataComp's wds_wilds-camelyon17_test", "test of WILDS: one hospital, 85,054 patches"
    ),
    "clevr_counts": _task(
        "wds_vtab-clevr_count_all_test", "test of VTAB: 15,000 images", words="clevr_count_all"
    ),
    "clevr_distance": _task(
        "wds_vtab-clevr_closest_object_distance_test",
        "test of VTAB: 15,000 images",
        words="clevr_closest_object_distance",
    ),
    "diabetic_retinopathy": _task(
        "wds_vtab-diabetic_retinopathy", "test of VTAB: 42,670 images", words="diabetic_retinopathy"
    ),
    "dmlab": _task("wds_vtab-dmlab", "test of VTAB: 22,735 images", words="dmlab"),
    "dollar_street": _task(
        "DataComp's wds_dollar_street_test",
        "3,503 images of 58 classes; the group is that of incomes",
        ("worst_group_top5", "top5", "top1"),
        options={"group": "0"},
    ),
    "dsprites_orientation": _task(
        "wds_vtab-dsprites_label_orientation",
        "test of VTAB: 73,728 images",
        words="dsprites_label_orientation",
        has_names=False,
    ),
    "dsprites_x_position": _task(
        "wds_vtab-dsprites_label_x_position",
        "test of VTAB: 73,728 images",
        words="dsprites_label_x_position",
        has_names=False,
    ),
    "dsprites_y_position": _task(
        "wds_vtab-dsprites_label_y_position", "test of VTAB: 73,728 images"
    ),
    "eurosat": _task("wds_vtab-eurosat_test", "test of VTAB: 5,400 images", words="eurosat"),
    "fer2013": _task("wds_fer2013", "test: 7,178 images", words="fer2013"),
    "fgvc_aircraft": _task(
        "wds_fgvc_aircraft_test",
        "test: 3,333 images of 100 variants",
        _PER_CLASS,
        words="fgvc_aircraft",
        has_names=False,
    ),
    "flickr8k_retrieval": _task(
        "wds_flickr8k",
        "Karpathy and Li's test split: 1,000 images with 5 captions each",
        ("t2i_r1", "i2t_r1"),
        kind=RETRIEVAL,
    ),
    "fmow": _task(
        "DataComp's wds_wilds-fmow_test",
        "test of WILDS: 22,108 images of 62 classes; the group is the region",
        ("worst_group", "top1", "mean_per_class"),
        options={"group": "0"},
    ),
    "geode": _task(
        "DataComp's wds_geode_test",
        "12,488 images of 40 classes; the group is the region",
        ("worst_group", "top1", "mean_per_class"),
        options={"group": "0"},
    ),
    "gtsrb": _task("wds_gtsrb_test", "test: 12,630 images", words="gtsrb"),
    "imagenet_o": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        split="2,000 images; its 200 classes compete",
        numbers=0,
        templates=lambda: prompts.imagenet_prompts()[1],
        class_names=lambda: prompts.imagenet_prompts()[0],
        options={"candidates": "with_images"},
        form="clip_benchmark:DIR, DIR being wds_imagenet-o_test in CLIP_benchmark's layout",
    ),
    "iwildcam": _task(
        "DataComp's wds_wilds-iwildcam_test",
        "test of WILDS: 42,791 images of 182 classes",
        ("f1_macro", "top1", "mean_per_class"),
        options={"f1": "macro"},
    ),
    "kitti_distance": _task(
        "wds_vtab-kitti_closest_vehicle_distance_test",
        "test of VTAB: 711 images",
        words="kitti_closest_vehicle_distance",
    ),
    "mnist": _task("wds_mnist_test", "test: 10,000 images", words="mnist"),
    "pcam": _task("wds_vtab-pcam_test", "test: 32,768 images", words="pcam"),
    "rendered_sst2": _task(
        "wds_renderedsst2_test", "test: 1,821 images", words="renderedsst2", has_names=False
    ),
    "resisc45": _task(
        "wds_vtab-resisc45_test", "test of VTAB: 6,300 images", words="resisc45", has_names=False
    ),
    "smallnorb_azimuth": _task(
        "wds_vtab-smallnorb_label_azimuth",
        "test of VTAB: 12,150 images",
        words="smallnorb_label_azimuth",
        has_names=False,
    ),
    "smallnorb_elevation": _task(
        "wds_vtab-smallnorb_label_elevation",
        "test of VTAB: 12,150 images",
        words="smallnorb_label_elevation",
        has_names=False,
    ),
    "svhn": _task("wds_vtab-svhn_test", "test: 26,032 images", words="svhn"),
    "voc2007_objects": _task(
        "wds_voc2007_test",
        "test: the 14,976 objects of VOC 2007, each cut out",
        words="voc2007",
        has_names=False,
    ),
    "winogavil": SuiteEntry(
        "winogavil",
        NO_SOURCE,
        ("jaccard_10_12", "jaccard"),
        split="test: 3,563 games",
        numbers=0,
        form="DIR/winogavil_dataset.csv, with DIR/winogavil_images beside it",
    ),
}

TASKS_BY_NAME: dict[str, SuiteEntry] = {**SUITE, **BENCHMARK_TASKS}
