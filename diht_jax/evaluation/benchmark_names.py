"""The names that DataComp and CLIP_benchmark give to data sets, and what they are called here.

DataComp's are the keys of its `tasklist.yml`, in that order, without FairFace and UTKFace, which
have no main metric and count for none of its 38; CLIP_benchmark's those that version 1.6.2 knows
(`datasets/builder.py`), without the prefix "wds/".
"""

from __future__ import annotations

import dataclasses

from diht_jax.evaluation.benchmark_tasks import TASKS_BY_NAME
from diht_jax.evaluation.suite import CLASSIFICATION, MULTILABEL, RETRIEVAL

_FOLDER = "clip_benchmark:"

# DataComp's key -> the task here.
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

# CLIP_benchmark's name -> the task here; "" where it takes a name of one's own, since the folder
# decides all of it: "NAME=clip_benchmark:DIR".
CLIP_BENCHMARK: dict[str, str] = {
    "imagenet1k": "imagenet",
    "imagenet1k-unverified": "imagenet",
    "imagenetv2": "imagenet_v2",
    "imagenet_sketch": "imagenet_sketch",
    "imagenet-a": "imagenet_a",
    "imagenet-r": "imagenet_r",
    "imagenet-o": "imagenet_o",
    "imagenet-w": "",
    "babel_imagenet": "",
    "objectnet": "objectnet",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "caltech101": "caltech101",
    "cars": "stanford_cars",
    "country211": "country211",
    "dtd": "dtd",
    "eurosat": "eurosat",
    "fer2013": "fer2013",
    "fgvc_aircraft": "fgvc_aircraft",
    "flowers": "flowers102",
    "food101": "food101",
    "gtsrb": "gtsrb",
    "mnist": "mnist",
    "pcam": "pcam",
    "pets": "oxford_pets",
    "renderedsst2": "rendered_sst2",
    "stl10": "stl10",
    "sun397": "sun397",
    "voc2007": "voc2007_objects",
    "voc2007_multilabel": "voc2007",
    "vtab/caltech101": "caltech101",
    "vtab/cars": "stanford_cars",
    "vtab/cifar10": "cifar10",
    "vtab/cifar100": "cifar100",
    "vtab/clevr_count_all": "clevr_counts",
    "vtab/clevr_closest_object_distance": "clevr_distance",
    "vtab/cub": "",
    "vtab/diabetic_retinopathy": "diabetic_retinopathy",
    "vtab/dmlab": "dmlab",
    "vtab/dsprites_label_orientation": "dsprites_orientation",
    "vtab/dsprites_label_x_position": "dsprites_x_position",
    "vtab/dsprites_label_y_position": "dsprites_y_position",
    "vtab/dtd": "dtd",
    "vtab/eurosat": "eurosat",
    "vtab/flowers": "flowers102",
    "vtab/food101": "food101",
    "vtab/inaturalist": "",
    "vtab/kitti_closest_vehicle_distance": "kitti_distance",
    "vtab/pcam": "pcam",
    "vtab/pets": "oxford_pets",
    "vtab/resisc45": "resisc45",
    "vtab/smallnorb_label_azimuth": "smallnorb_azimuth",
    "vtab/smallnorb_label_elevation": "smallnorb_elevation",
    "vtab/sun397": "sun397",
    "vtab/svhn": "svhn",
    "mscoco_captions": "coco_retrieval",
    "flickr30k": "flickr30k_retrieval",
    "flickr8k": "flickr8k_retrieval",
    "flickr30k-200": "",
    "multilingual_mscoco_captions": "",
    "crossmodal3600": "",
    "xtd10": "",
    "xtd200": "",
    "winoground": "winoground",
    "sugar_crepe/add_att": "sugarcrepe_add_att",
    "sugar_crepe/add_obj": "sugarcrepe_add_obj",
    "sugar_crepe/replace_att": "sugarcrepe_replace_att",
    "sugar_crepe/replace_obj": "sugarcrepe_replace_obj",
    "sugar_crepe/replace_rel": "sugarcrepe_replace_rel",
    "sugar_crepe/swap_att": "sugarcrepe_swap_att",
    "sugar_crepe/swap_obj": "sugarcrepe_swap_obj",
}


# Where DataComp's own download makes no folder: what it takes from Hugging Face's cache instead.
_OTHER_FOLDERS = {
    "retrieval/flickr_1k_test_image_text_retrieval": "wds_flickr30k",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": "wds_mscoco_captions",
    "misc/winogavil": "winogavil",
}
_KINDS_OF_FOLDERS = (CLASSIFICATION, MULTILABEL, RETRIEVAL)
# The other benchmarks measure so, where a task here has options of its own.
_OPTIONS = {RETRIEVAL: "?caption_template={caption}", MULTILABEL: "?interpolation=all"}


@dataclasses.dataclass(frozen=True)
class NameRow:
    """A row of the table of docs/evaluation_sets.md.

    Attributes:
        theirs: the name in the other benchmark.
        ours: the task by name, or "NAME" where any name will do.
        kind: of the protocol; that of the folder where any name will do.
        metrics: what is reported: the other benchmark's main metric, by the name that it has here.
        source: what follows "ours=", with a folder that is named as on Hugging Face.
    """

    theirs: str
    ours: str
    kind: str
    metrics: tuple[str, ...]
    source: str


def datacomp_rows() -> list[NameRow]:
    """One row for each of DataComp's 38 tasks."""
    return [
        NameRow(
            theirs,
            ours,
            TASKS_BY_NAME[ours].kind,
            datacomp_metrics(ours),
            datacomp_source(theirs, datacomp_folder(theirs)),
        )
        for theirs, ours in DATACOMP.items()
    ]


def clip_benchmark_rows() -> list[NameRow]:
    """One row for each name that CLIP_benchmark knows."""
    rows = []
    for theirs, ours in CLIP_BENCHMARK.items():
        source = f"{_FOLDER}wds_{theirs.replace('/', '-')}"
        if not ours:
            rows.append(NameRow(theirs, "NAME", "that of the folder", (), source))
            continue
        entry = TASKS_BY_NAME[ours]
        source = (
            entry.form
            if entry.kind not in _KINDS_OF_FOLDERS
            else source + _OPTIONS.get(entry.kind, "")
        )
        rows.append(NameRow(theirs, ours, entry.kind, datacomp_metrics(ours), source))
    return rows


def datacomp_metrics(task: str) -> tuple[str, ...]:
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
    if kind not in _KINDS_OF_FOLDERS:
        return f"{folder}/winogavil_dataset.csv"
    return f"{_FOLDER}{folder}{_OPTIONS.get(kind, '')}"
