"""The tasks that are known by name: the zero-shot suite of DiHT, and ImageNet's shifted versions.

The list is the one of DiHT, arXiv 2301.02280, section "Evaluation", as far as it is known to us: 17
classifications, retrieval both ways on 5 sets (10 numbers) and 2 on questions. Behind them stand
the sets on which CLIP's robustness is measured, which count for none of the 29. Sources are TFDS
where it has the images and labels that the task needs, else `NO_SOURCE`: then the user gives one,
`split` is what of the data set belongs in it, and `form` how it is given. Class names that are not
given here come with the data.

Templates are CLIP's (arXiv 2103.00020), read from installed packages (`prompts`). No package has
those of Birdsnap, UCF-101 and of Hateful Memes, which stand here and in `prompts`: they are in the
file `data/prompts.md` of CLIP's repository. Ours: the templates of Open Images, its mean average
precision over all points, and the splits that are marked so. docs/evaluation_sets.md has each
beside CLIP's, and the way from a public download to what a task accepts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from diht_jax.evaluation import prompts

CLASSIFICATION = "classification"
MULTILABEL = "multilabel"
RETRIEVAL = "retrieval"

NO_SOURCE = ""


@dataclasses.dataclass(frozen=True)
class SuiteEntry:
    """A task by name.

    Attributes:
        kind: of `protocols.registry.PROTOCOLS`.
        source: of `sources.registry`, or `NO_SOURCE`.
        metrics: the first is the one that DiHT reports.
        split: what of the data set is evaluated.
        numbers: how many of the 29 it gives; 0 outside of the suite.
        templates: makes the templates; the kind's own where None.
        class_names: makes the class names; they come with the data where None.
        tfds_class_names: makes better ones for a TFDS source, in the order of its labels.
        source_options: of the source.
        options: of the protocol, where they differ from its own.
        form: how a source of one's own is given, what follows `NAME=`, where there is none.
    """

    kind: str
    source: str
    metrics: tuple[str, ...]
    split: str
    numbers: int = 1
    templates: Callable[[], tuple[str, ...]] | None = None
    class_names: Callable[[], tuple[str, ...]] | None = None
    tfds_class_names: Callable[[], tuple[str, ...]] | None = None
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: str = ""


def _templates(name: str) -> Callable[[], tuple[str, ...]]:
    return lambda: prompts.benchmark_templates(name)


def _names(name: str) -> Callable[[], tuple[str, ...]]:
    return lambda: prompts.benchmark_class_names(name)


# Questions of SugarCrepe's files.
_SUGARCREPE_SIZES = {
    "add_att": 692,
    "add_obj": 2062,
    "replace_att": 788,
    "replace_obj": 1652,
    "replace_rel": 1406,
    "swap_att": 666,
    "swap_obj": 245,
}

_FOLDER = "DIR, a folder with one sub-folder per class, or clip_benchmark:DIR"
_TOP1 = ("top1", "top5", "mean_per_class")
_BOTH_WAYS = ("t2i_r1", "i2t_r1")


def _shifted_imagenet(source: str, split: str, *, with_images: bool = False) -> SuiteEntry:
    """Other pictures of ImageNet's classes; of some sets only of those that have images."""
    return SuiteEntry(
        CLASSIFICATION,
        source,
        _TOP1,
        split=split,
        numbers=0,
        templates=lambda: prompts.imagenet_prompts()[1],
        class_names=lambda: prompts.imagenet_prompts()[0],
        options={"candidates": "with_images"} if with_images else {},
    )


def _caption_choice(metrics: tuple[str, ...], split: str, form: str, **options: Any) -> SuiteEntry:
    return SuiteEntry(
        "caption_choice",
        NO_SOURCE,
        metrics,
        split=split,
        numbers=0,
        options=options,
        form=form,
    )


def _sugarcrepe(subset: str, size: int) -> SuiteEntry:
    """One of SugarCrepe's seven subsets."""
    return _caption_choice(
        ("accuracy",),
        f"the {size:,} questions of {subset}.json",
        f"sugarcrepe:DIR/{subset}.json?image_root=val2017, SugarCrepe's file and COCO's pictures",
    )


SUITE: dict[str, SuiteEntry] = {
    "birdsnap": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        split="its test split (test_images.txt)",
        templates=lambda: ("a photo of a {}, a type of bird.",),
        form="list:DIR/test_images.txt?image_root=DIR/images, Birdsnap's list and its pictures",
    ),
    "cifar10": SuiteEntry(
        CLASSIFICATION,
        "tfds:cifar10:test",
        _TOP1,
        split="test",
        templates=_templates("cifar10"),
        class_names=lambda: prompts.CIFAR10_CLASSES,
    ),
    "cifar100": SuiteEntry(
        CLASSIFICATION,
        "tfds:cifar100:test",
        _TOP1,
        split="test",
        templates=_templates("cifar100"),
        source_options={"caption_feature": "label"},
    ),
    "caltech101": SuiteEntry(
        CLASSIFICATION,
        "tfds:caltech101:test",
        ("mean_per_class", "top1"),
        split="test of TFDS (30 images a class are its training split; the background is a class)",
        templates=_templates("caltech101"),
        tfds_class_names=_names("caltech101_vtab"),
    ),
    "country211": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        split="its test split (the folder `test` of CLIP's country211.tgz, 100 images a country)",
        templates=_templates("country211"),
        class_names=_names("country211"),
        form=_FOLDER,
    ),
    "dtd": SuiteEntry(
        CLASSIFICATION,
        "tfds:dtd:test",
        _TOP1,
        split="test of the first of its ten divisions",
        templates=_templates("dtd"),
    ),
    "flowers102": SuiteEntry(
        CLASSIFICATION,
        "tfds:oxford_flowers102:test",
        ("mean_per_class", "top1"),
        split="test",
        templates=_templates("flowers"),
        tfds_class_names=_names("flowers"),
    ),
    "food101": SuiteEntry(
        CLASSIFICATION,
        "tfds:food101:validation",
        _TOP1,
        split="test, which TFDS calls validation",
        templates=_templates("food101"),
    ),
    "imagenet": SuiteEntry(
        CLASSIFICATION,
        "tfds:imagenet2012:validation",
        _TOP1,
        split="validation",
        templates=lambda: prompts.imagenet_prompts()[1],
        class_names=lambda: prompts.imagenet_prompts()[0],
    ),
    "oxford_pets": SuiteEntry(
        CLASSIFICATION,
        "tfds:oxford_iiit_pet:test",
        ("mean_per_class", "top1"),
        split="test",
        templates=_templates("pets"),
        tfds_class_names=_names("pets"),
        source_options={"image_feature": "image", "caption_feature": "label"},
    ),
    "stl10": SuiteEntry(
        CLASSIFICATION, "tfds:stl10:test", _TOP1, split="test", templates=_templates("stl10")
    ),
    "sun397": SuiteEntry(
        CLASSIFICATION,
        "tfds:sun397/standard-part1-120k:test",
        _TOP1,
        split="test of the first standard partition (19,850 images)",
        templates=_templates("sun397"),
    ),
    "stanford_cars": SuiteEntry(
        CLASSIFICATION, "tfds:cars196:test", _TOP1, split="test", templates=_templates("cars")
    ),
    "ucf101": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        split="the middle frame of every test clip, the mean over the three test splits",
        templates=lambda: prompts.UCF101_TEMPLATES,
        class_names=lambda: prompts.UCF101_CLASSES,
        source_options={"splits": "1,2,3"},
        form="list:DIR/testlist{:02}.txt?image_root=FRAMES, UCF-101's lists and its frames",
    ),
    "hateful_memes": SuiteEntry(
        "binary",
        NO_SOURCE,
        ("auroc",),
        split="the 500 memes of dev_seen.jsonl",
        templates=lambda: ("a {}.",),
        class_names=lambda: ("meme", "hatespeech meme"),
        source_options={"image_column": "img", "caption_column": "text"},
        form="DIR/dev_seen.jsonl, with DIR/img beside it",
    ),
    "voc2007": SuiteEntry(
        MULTILABEL,
        NO_SOURCE,
        ("mean_average_precision",),
        split="test (4,952 images, 20 classes)",
        templates=_templates("voc2007_multilabel"),
        options={"interpolation": 11},
        form="voc:VOCdevkit/VOC2007, the folder of VOCtest_06-Nov-2007.tar",
    ),
    "open_images": SuiteEntry(
        MULTILABEL,
        NO_SOURCE,
        ("mean_average_precision",),
        split=(
            "validation (ours: the verified image-level labels of the 601 boxable classes on its "
            "41,620 images)"
        ),
        templates=lambda: prompts.PLAIN_TEMPLATES,
        form=(
            "open_images:DIR, with validation-annotations-human-imagelabels-boxable.csv, "
            "class-descriptions-boxable.csv and the pictures in DIR/validation"
        ),
    ),
    "coco_retrieval": SuiteEntry(
        RETRIEVAL,
        "tfds:coco_captions:test",
        _BOTH_WAYS,
        split="Karpathy and Li's test split (5,000 images)",
        numbers=2,
        source_options={"caption_feature": "captions/text"},
    ),
    "flickr30k_retrieval": SuiteEntry(
        RETRIEVAL,
        NO_SOURCE,
        _BOTH_WAYS,
        split="Karpathy and Li's test split (1,000 images with 5 captions each)",
        numbers=2,
        form="flickr30k_test.json?image_root=DIR, ALBEF's file and Flickr30K's images",
    ),
    "localized_narratives_coco": SuiteEntry(
        RETRIEVAL,
        NO_SOURCE,
        _BOTH_WAYS,
        split="the narratives on COCO's val2017",
        numbers=2,
        source_options={"image_column": "image_id", "image_name": "{:0>12}.jpg"},
        form="coco_val_localized_narratives.jsonl?image_root=DIR, with COCO's val2017 in DIR",
    ),
    "localized_narratives_flickr": SuiteEntry(
        RETRIEVAL,
        NO_SOURCE,
        _BOTH_WAYS,
        split="the narratives on Flickr30K's test split",
        numbers=2,
        source_options={"image_column": "image_id", "image_name": "{}.jpg"},
        form="flickr30k_test_localized_narratives.jsonl?image_root=DIR, with Flickr30K's images",
    ),
    "winoground": SuiteEntry(
        "winoground",
        NO_SOURCE,
        ("image", "text", "group"),
        split="all 400 examples",
        numbers=2,
        form="DIR/examples.jsonl, with DIR/images beside it",
    ),
    "snli_ve": SuiteEntry(
        "entailment",
        NO_SOURCE,
        ("accuracy",),
        split="test",
        source_options={"image_name": "{}.jpg"},
        form="ve_test.json?image_root=DIR, ALBEF's file and Flickr30K's images",
    ),
    "vqav2": SuiteEntry(
        "vqa",
        NO_SOURCE,
        ("accuracy",),
        split="validation, since the answers of its test splits are not public",
        form=(
            "vqa_val.json?image_root=DIR&class_names=answer_list.json, ALBEF's files and COCO's "
            "images with val2014 in DIR"
        ),
    ),
    "imagenet_v2": _shifted_imagenet(
        "tfds:imagenet_v2/matched-frequency:test", "test, matched frequency (10,000 images)"
    ),
    "imagenet_sketch": _shifted_imagenet("tfds:imagenet_sketch:test", "test (50,889 images)"),
    "imagenet_r": _shifted_imagenet(
        "tfds:imagenet_r:test", "test (30,000 images; its 200 classes compete)", with_images=True
    ),
    "imagenet_a": _shifted_imagenet(
        "tfds:imagenet_a:test", "test (7,500 images; its 200 classes compete)", with_images=True
    ),
    "objectnet": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        split="the pictures of the 113 classes that it shares with ImageNet",
        numbers=0,
        templates=lambda: prompts.imagenet_prompts()[1],
        form="objectnet:objectnet-1.0, the folder of objectnet-1.0.zip",
    ),
    "sugarcrepe": _caption_choice(
        ("macro_accuracy", "accuracy"),
        "all seven files (7,511 questions)",
        "sugarcrepe:DIR?image_root=val2017, SugarCrepe's folder `data` and COCO's pictures",
    ),
    **{f"sugarcrepe_{name}": _sugarcrepe(name, size) for name, size in _SUGARCREPE_SIZES.items()},
    "aro_vg_relation": _caption_choice(
        ("macro_accuracy", "accuracy"),
        "all test cases (23,937); of them for macro accuracy those of relations with an order",
        "aro:DIR/visual_genome_relation.json, with DIR/images beside it",
    ),
    "aro_vg_attribution": _caption_choice(
        ("macro_accuracy", "accuracy"),
        "all test cases (28,748); for macro accuracy pairs of attributes with 25 or more",
        "aro:DIR/visual_genome_attribution.json, with DIR/images beside it",
    ),
    "aro_coco_order": _caption_choice(
        ("accuracy",),
        "the captions of Karpathy and Li's test split of COCO (5,000 images), each in four orders",
        "aro:coco_order.json?image_root=DIR, the shuffled captions and COCO's val2014 in DIR",
        ties="right",
    ),
    "aro_flickr30k_order": _caption_choice(
        ("accuracy",),
        "the captions of Karpathy and Li's test split of Flickr30K (1,000 images), each in four "
        "orders",
        "aro:flickr30k_order.json?image_root=DIR, the shuffled captions and Flickr30K's images",
        ties="right",
    ),
}
