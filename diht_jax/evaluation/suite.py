"""The tasks that are known by name: DiHT's zero-shot suite, and those of other benchmarks.

`SUITE` begins with the list of DiHT, arXiv 2301.02280, section "Evaluation", as far as it is known
to us: 17 classifications, retrieval both ways on 5 sets (10 numbers) and 2 on questions. After them
come the sets on which CLIP's robustness is measured, and choices between captions, which count for
none of the 29. Sources are TFDS where it has the images and labels that the task needs, else
`NO_SOURCE`: then the user gives one, `split` is what of the data set belongs in it, and `form` how
it is given. Class names that are not given here come with the data.

`BENCHMARK_TASKS` are the others of DataComp's 38 (arXiv 2304.14108) and of CLIP_benchmark. All but
WinoGAViL take a folder in CLIP_benchmark's layout (`sources/benchmark_folder`), as DataComp's
`download_evalsets.py` writes one for each, and as huggingface.co/clip-benchmark offers them. The
folder brings class names and prompts, and they count before those that stand here, which are
CLIP_benchmark's and serve for other sources.

Templates are CLIP's (arXiv 2103.00020), read from installed packages (`prompts`). No package has
those of Birdsnap, UCF-101 and Hateful Memes, which stand here and in `prompts`: they are in the
file `data/prompts.md` of CLIP's repository. Ours: the templates of Open Images, its mean average
precision over all points, and the splits that are marked so. docs/reference/evaluation_sets.md has
each next to CLIP's, and the way from a public download to what a task accepts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diht_jax.evaluation import prompts

CLASSIFICATION, MULTILABEL, RETRIEVAL = "classification", "multilabel", "retrieval"
NO_SOURCE = ""
IMAGENET = "imagenet"

TOP1 = ("top1", "top5", "mean_per_class")
PER_CLASS = ("mean_per_class", "top1")
BOTH_WAYS = ("t2i_r1", "i2t_r1")
WORST_GROUP = ("worst_group", "top1", "mean_per_class")


@dataclasses.dataclass(frozen=True)
class SuiteEntry:
    """A task by name.

    Attributes:
        kind: of `protocols.registry.PROTOCOLS`.
        split: what of the data set is evaluated.
        source: of `sources.registry`, or `NO_SOURCE`.
        form: how users give a source, what follows `NAME=`, where there is none.
        metrics: the first is the one that DiHT, or DataComp, reports.
        numbers: how many of the 29 it gives; 0 outside of the suite.
        datacomp: its key in DataComp's `tasklist.yml`, such as "vtab/dtd".
        templates: of the prompts, as `prompts.parse_templates` takes them; the kind's own where
            None.
        class_names: as `prompts.read_class_names` takes them; they come with the data where None.
        tfds_class_names: better ones for a TFDS source, in the order of its labels.
        source_options: of the source.
        options: of the protocol, where they differ from its own.
    """

    kind: str
    split: str
    source: str = NO_SOURCE
    form: str = ""
    metrics: tuple[str, ...] = TOP1
    numbers: int = 0
    datacomp: str = ""
    templates: str | tuple[str, ...] | None = None
    class_names: str | tuple[str, ...] | None = None
    tfds_class_names: str | None = None
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _classes(split: str, source: str, datacomp: str, **fields: Any) -> SuiteEntry:
    """A classification of the suite, with clip_benchmark's prompts of the name in DataComp."""
    templates = f"clip_benchmark:{datacomp.rpartition('/')[2]}"
    fields = {"templates": templates, "numbers": 1, **fields}
    return SuiteEntry(CLASSIFICATION, split, source, datacomp=datacomp, **fields)


def _imagenet(split: str, source: str = NO_SOURCE, datacomp: str = "", **fields: Any) -> SuiteEntry:
    """Pictures of ImageNet's classes, with CLIP's names and 80 templates."""
    fields = {"templates": IMAGENET, "class_names": IMAGENET, **fields}
    return SuiteEntry(CLASSIFICATION, split, source, datacomp=datacomp, **fields)


def _retrieval(split: str, form: str = "", **fields: Any) -> SuiteEntry:
    options = {"caption_template": prompts.CAPTION_TEMPLATE}
    return SuiteEntry(
        RETRIEVAL, split, form=form, metrics=BOTH_WAYS, numbers=2, options=options, **fields
    )


def _choice(split: str, form: str, *, macro: bool = False, **options: Any) -> SuiteEntry:
    """A choice between captions."""
    metrics = ("macro_accuracy", "accuracy") if macro else ("accuracy",)
    return SuiteEntry("caption_choice", split, form=form, metrics=metrics, options=options)


def _sugarcrepe(subset: str, size: int) -> SuiteEntry:
    """One of SugarCrepe's seven subsets, and the number of its questions."""
    return _choice(
        f"the {size:,} questions of {subset}.json",
        f"sugarcrepe:DIR/{subset}.json?image_root=val2017, SugarCrepe's file and COCO's pictures",
    )


def _folder(
    key: str,
    split: str,
    *,
    words: bool = True,
    names: bool = True,
    in_datacomp: bool = True,
    **fields: Any,
) -> SuiteEntry:
    """A task on a folder in CLIP_benchmark's layout.

    Args:
        key: the name there.
        split: see `SuiteEntry`.
        words: whether the package has prompts of that name.
        names: whether it has class names, too.
        in_datacomp: whether it is one of DataComp's, by the same key.
        **fields: of `SuiteEntry`.
    """
    if words:
        fields["templates"] = f"clip_benchmark:{key.rpartition('/')[2]}"
        fields["class_names"] = fields["templates"] if names else None
    name = datacomp_folder(key) if in_datacomp else f"wds_{key.replace('/', '-')}"
    fields.setdefault("kind", CLASSIFICATION)
    return SuiteEntry(
        **fields,
        split=split,
        form=f"clip_benchmark:DIR, DIR being {name} in CLIP_benchmark's layout",
        datacomp=key if in_datacomp else "",
    )


def _vtab(name: str, images: int, **options: bool) -> SuiteEntry:
    return _folder(f"vtab/{name}", f"test of VTAB: {images:,} images", **options)


# Where DataComp's own download makes no folder: what it takes from Hugging Face's cache instead.
_OTHER_FOLDERS = {
    "retrieval/flickr_1k_test_image_text_retrieval": "wds_flickr30k",
    "retrieval/mscoco_2014_5k_test_image_text_retrieval": "wds_mscoco_captions",
    "misc/winogavil": "winogavil",
}


def datacomp_folder(key: str) -> str:
    """The folder of a task below that of DataComp's download, such as "wds_vtab-dtd_test"."""
    made = f"wds_{key.removeprefix('fairness/').replace('/', '-')}_test"
    return _OTHER_FOLDERS.get(key, made)


SUITE: dict[str, SuiteEntry] = {
    "birdsnap": SuiteEntry(
        CLASSIFICATION,
        "its test split (test_images.txt)",
        form="list:DIR/test_images.txt?image_root=DIR/images, Birdsnap's list and its pictures",
        numbers=1,
        templates=("a photo of a {}, a type of bird.",),
    ),
    "cifar10": _classes(
        "test", "tfds:cifar10:test", "cifar10", class_names=prompts.CIFAR10_CLASSES
    ),
    "cifar100": _classes(
        "test",
        "tfds:cifar100:test",
        "vtab/cifar100",
        source_options={"caption_feature": "label"},
    ),
    "caltech101": _classes(
        "test of TFDS (30 images a class are its training split; the background is a class)",
        "tfds:caltech101:test",
        "vtab/caltech101",
        metrics=PER_CLASS,
        tfds_class_names="clip_benchmark:caltech101_vtab",
    ),
    "country211": _classes(
        "its test split (the folder `test` of CLIP's country211.tgz, 100 images a country)",
        NO_SOURCE,
        "country211",
        class_names="clip_benchmark:country211",
        form="DIR, a folder with one sub-folder per class, or clip_benchmark:DIR",
    ),
    "dtd": _classes("test of the first of its ten divisions", "tfds:dtd:test", "vtab/dtd"),
    "flowers102": _classes(
        "test",
        "tfds:oxford_flowers102:test",
        "vtab/flowers",
        metrics=PER_CLASS,
        tfds_class_names="clip_benchmark:flowers",
    ),
    "food101": _classes("test, which TFDS calls validation", "tfds:food101:validation", "food101"),
    "imagenet": _imagenet("validation", "tfds:imagenet2012:validation", "imagenet1k", numbers=1),
    "oxford_pets": _classes(
        "test",
        "tfds:oxford_iiit_pet:test",
        "vtab/pets",
        metrics=PER_CLASS,
        tfds_class_names="clip_benchmark:pets",
        source_options={"image_feature": "image", "caption_feature": "label"},
    ),
    "stl10": _classes("test", "tfds:stl10:test", "stl10"),
    "sun397": _classes(
        "test of the first standard partition (19,850 images)",
        "tfds:sun397/standard-part1-120k:test",
        "sun397",
    ),
    "stanford_cars": _classes("test", "tfds:cars196:test", "cars"),
    "ucf101": SuiteEntry(
        CLASSIFICATION,
        "the middle frame of every test clip, the mean over the three test splits",
        form="list:DIR/testlist{:02}.txt?image_root=FRAMES, UCF-101's lists and its frames",
        numbers=1,
        templates=prompts.UCF101_TEMPLATES,
        class_names=prompts.UCF101_CLASSES,
        source_options={"splits": "1,2,3"},
    ),
    "hateful_memes": SuiteEntry(
        "binary",
        "the 500 memes of dev_seen.jsonl",
        metrics=("auroc",),
        numbers=1,
        templates=("a {}.",),
        class_names=("meme", "hatespeech meme"),
        source_options={"image_column": "img", "caption_column": "text"},
        form="DIR/dev_seen.jsonl, with DIR/img next to it",
    ),
    "voc2007": SuiteEntry(
        MULTILABEL,
        "test (4,952 images, 20 classes)",
        metrics=("mean_average_precision",),
        numbers=1,
        templates="clip_benchmark:voc2007_multilabel",
        options={"interpolation": "11"},
        form="voc:VOCdevkit/VOC2007, the folder of VOCtest_06-Nov-2007.tar",
    ),
    "open_images": SuiteEntry(
        MULTILABEL,
        "validation (ours: the verified image-level labels of the 601 boxable classes on its "
        "41,620 images)",
        metrics=("mean_average_precision",),
        numbers=1,
        templates=prompts.PLAIN_TEMPLATES,
        form=(
            "open_images:DIR, with validation-annotations-human-imagelabels-boxable.csv, "
            "class-descriptions-boxable.csv and the pictures in DIR/validation"
        ),
    ),
    "coco_retrieval": _retrieval(
        "Karpathy and Li's test split (5,000 images)",
        source="tfds:coco_captions:test",
        source_options={"caption_feature": "captions/text"},
        datacomp="retrieval/mscoco_2014_5k_test_image_text_retrieval",
    ),
    "flickr30k_retrieval": _retrieval(
        "Karpathy and Li's test split (1,000 images with 5 captions each)",
        "flickr30k_test.json?image_root=DIR, ALBEF's file and Flickr30K's images",
        datacomp="retrieval/flickr_1k_test_image_text_retrieval",
    ),
    "localized_narratives_coco": _retrieval(
        "the narratives on COCO's val2017",
        "coco_val_localized_narratives.jsonl?image_root=DIR, with COCO's val2017 in DIR",
        source_options={"image_column": "image_id", "image_name": "{:0>12}.jpg"},
    ),
    "localized_narratives_flickr": _retrieval(
        "the narratives on Flickr30K's test split",
        "flickr30k_test_localized_narratives.jsonl?image_root=DIR, with Flickr30K's images",
        source_options={"image_column": "image_id", "image_name": "{}.jpg"},
    ),
    "winoground": SuiteEntry(
        "winoground",
        "all 400 examples",
        metrics=("image", "text", "group"),
        numbers=2,
        form="DIR/examples.jsonl, with DIR/images next to it",
    ),
    "snli_ve": SuiteEntry(
        "entailment",
        "test",
        metrics=("accuracy",),
        numbers=1,
        source_options={"image_name": "{}.jpg"},
        form="ve_test.json?image_root=DIR, ALBEF's file and Flickr30K's images",
    ),
    "vqav2": SuiteEntry(
        "vqa",
        "validation, since the answers of its test splits are not public",
        metrics=("accuracy",),
        numbers=1,
        form=(
            "vqa_val.json?image_root=DIR&class_names=answer_list.json, ALBEF's files and COCO's "
            "images with val2014 in DIR"
        ),
    ),
    "imagenet_v2": _imagenet(
        "test, matched frequency (10,000 images)",
        "tfds:imagenet_v2/matched-frequency:test",
        "imagenetv2",
    ),
    "imagenet_sketch": _imagenet(
        "test (50,889 images)", "tfds:imagenet_sketch:test", "imagenet_sketch"
    ),
    "imagenet_r": _imagenet(
        "test (30,000 images; its 200 classes compete)",
        "tfds:imagenet_r:test",
        "imagenet-r",
        options={"candidates": "with_images"},
    ),
    "imagenet_a": _imagenet(
        "test (7,500 images; its 200 classes compete)",
        "tfds:imagenet_a:test",
        "imagenet-a",
        options={"candidates": "with_images"},
    ),
    "objectnet": _imagenet(
        "the pictures of the 113 classes that it shares with ImageNet",
        datacomp="objectnet",
        class_names=None,
        form="objectnet:objectnet-1.0, the folder of objectnet-1.0.zip",
    ),
    "sugarcrepe": _choice(
        "all seven files (7,511 questions)",
        "sugarcrepe:DIR?image_root=val2017, SugarCrepe's folder `data` and COCO's pictures",
        macro=True,
    ),
    "sugarcrepe_add_att": _sugarcrepe("add_att", 692),
    "sugarcrepe_add_obj": _sugarcrepe("add_obj", 2062),
    "sugarcrepe_replace_att": _sugarcrepe("replace_att", 788),
    "sugarcrepe_replace_obj": _sugarcrepe("replace_obj", 1652),
    "sugarcrepe_replace_rel": _sugarcrepe("replace_rel", 1406),
    "sugarcrepe_swap_att": _sugarcrepe("swap_att", 666),
    "sugarcrepe_swap_obj": _sugarcrepe("swap_obj", 245),
    "aro_vg_relation": _choice(
        "all test cases (23,937); of them for macro accuracy those of relations with an order",
        "aro:DIR/visual_genome_relation.json, with DIR/images next to it",
        macro=True,
    ),
    "aro_vg_attribution": _choice(
        "all test cases (28,748); for macro accuracy pairs of attributes with 25 or more",
        "aro:DIR/visual_genome_attribution.json, with DIR/images next to it",
        macro=True,
    ),
    "aro_coco_order": _choice(
        "the captions of Karpathy and Li's test split of COCO (5,000 images), each in four orders",
        "aro:coco_order.json?image_root=DIR, the shuffled captions and COCO's val2014 in DIR",
        ties="right",
    ),
    "aro_flickr30k_order": _choice(
        "the captions of Karpathy and Li's test split of Flickr30K (1,000 images), each in four "
        "orders",
        "aro:flickr30k_order.json?image_root=DIR, the shuffled captions and Flickr30K's images",
        ties="right",
    ),
}

BENCHMARK_TASKS: dict[str, SuiteEntry] = {
    "camelyon17": _folder(
        "wilds/camelyon17", "test of WILDS: one hospital, 85,054 patches", words=False
    ),
    "clevr_counts": _vtab("clevr_count_all", 15_000),
    "clevr_distance": _vtab("clevr_closest_object_distance", 15_000),
    "diabetic_retinopathy": _vtab("diabetic_retinopathy", 42_670, in_datacomp=False),
    "dmlab": _vtab("dmlab", 22_735, in_datacomp=False),
    "dollar_street": _folder(
        "fairness/dollar_street",
        "3,503 images of 58 classes; the group is that of incomes",
        words=False,
        metrics=("worst_group_top5", "top5", "top1"),
        options={"group": "0"},
    ),
    "dsprites_orientation": _vtab(
        "dsprites_label_orientation", 73_728, names=False, in_datacomp=False
    ),
    "dsprites_x_position": _vtab(
        "dsprites_label_x_position", 73_728, names=False, in_datacomp=False
    ),
    "dsprites_y_position": _vtab(
        "dsprites_label_y_position", 73_728, words=False, in_datacomp=False
    ),
    "eurosat": _vtab("eurosat", 5_400),
    "fer2013": _folder("fer2013", "test: 7,178 images", in_datacomp=False),
    "fgvc_aircraft": _folder(
        "fgvc_aircraft",
        "test: 3,333 images of 100 variants",
        names=False,
        metrics=PER_CLASS,
    ),
    "flickr8k_retrieval": _folder(
        "flickr8k",
        "Karpathy and Li's test split: 1,000 images with 5 captions each",
        words=False,
        in_datacomp=False,
        kind=RETRIEVAL,
        metrics=BOTH_WAYS,
        options={"caption_template": prompts.CAPTION_TEMPLATE},
    ),
    "fmow": _folder(
        "wilds/fmow",
        "test of WILDS: 22,108 images of 62 classes; the group is the region",
        words=False,
        metrics=WORST_GROUP,
        options={"group": "0"},
    ),
    "geode": _folder(
        "fairness/geode",
        "12,488 images of 40 classes; the group is the region",
        words=False,
        metrics=WORST_GROUP,
        options={"group": "0"},
    ),
    "gtsrb": _folder("gtsrb", "test: 12,630 images"),
    "imagenet_o": _folder(
        "imagenet-o",
        "2,000 images; its 200 classes compete",
        words=False,
        templates=IMAGENET,
        class_names=IMAGENET,
        options={"candidates": "with_images"},
    ),
    "iwildcam": _folder(
        "wilds/iwildcam",
        "test of WILDS: 42,791 images of 182 classes",
        words=False,
        metrics=("f1_macro", "top1", "mean_per_class"),
        options={"f1": "macro"},
    ),
    "kitti_distance": _vtab("kitti_closest_vehicle_distance", 711),
    "mnist": _folder("mnist", "test: 10,000 images"),
    "pcam": _vtab("pcam", 32_768),
    "rendered_sst2": _folder("renderedsst2", "test: 1,821 images", names=False),
    "resisc45": _vtab("resisc45", 6_300, names=False),
    "smallnorb_azimuth": _vtab("smallnorb_label_azimuth", 12_150, names=False, in_datacomp=False),
    "smallnorb_elevation": _vtab(
        "smallnorb_label_elevation", 12_150, names=False, in_datacomp=False
    ),
    "svhn": _vtab("svhn", 26_032),
    "voc2007_objects": _folder(
        "voc2007", "test: the 14,976 objects of VOC 2007, each cut out", names=False
    ),
    "winogavil": SuiteEntry(
        "winogavil",
        "test: 3,563 games",
        form="DIR/winogavil_dataset.csv, with DIR/winogavil_images next to it",
        metrics=("jaccard_10_12", "jaccard"),
        datacomp="misc/winogavil",
    ),
}

TASKS_BY_NAME: dict[str, SuiteEntry] = {**SUITE, **BENCHMARK_TASKS}

# DataComp's key -> the task here.
DATACOMP: dict[str, str] = {
    entry.datacomp: name for name, entry in TASKS_BY_NAME.items() if entry.datacomp
}
