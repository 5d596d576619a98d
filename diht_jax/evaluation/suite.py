"""The tasks that are known by name: the zero-shot suite of DiHT, and ImageNet's shifted versions.

The list is the one of DiHT, arXiv 2301.02280, section "Evaluation", as far as it is known to us: 17
classifications, retrieval both ways on 5 sets (10 numbers) and 2 on questions. After them come the
sets on which CLIP's robustness is measured, which count for none of the 29. Sources are TFDS where
it has the images and labels that the task needs, else `NO_SOURCE`: then the user gives one, `split`
is what of the data set belongs in it, and `form` how it is given. Class names that are not given
here come with the data.

Templates are CLIP's (arXiv 2103.00020), read from installed packages (`prompts`). No package has
those of Birdsnap, UCF-101 and of Hateful Memes, which stand here and in `prompts`: they are in the
file `data/prompts.md` of CLIP's repository. Ours: the templates of Open Images, its mean average
precision over all points, and the splits that are marked so. docs/evaluation_sets.md has each
next to CLIP's, and the way from a public download to what a task accepts.
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


@dataclasses.dataclass(frozen=True)
class SuiteEntry:
    """A task by name.

    Attributes:
        kind: of `protocols.registry.PROTOCOLS`.
        source: of `sources.registry`, or `NO_SOURCE`.
        metrics: the first is the one that DiHT reports.
        split: what of the data set is evaluated.
        numbers: how many of the 29 it gives; 0 outside of the suite.
        templates: of the prompts, or the name of a set (`prompts.parse_templates`); the kind's own
            where None.
        class_names: these, or where to read them: `IMAGENET`, or a set of clip_benchmark; they come
            with the data where None.
        tfds_class_names: better ones for a TFDS source, in the order of its labels.
        source_options: of the source.
        options: of the protocol, where they differ from its own.
        form: how users give a source, what follows `NAME=`, where there is none.
    """

    kind: str
    source: str
    metrics: tuple[str, ...]
    split: str
    numbers: int = 1
    templates: str | tuple[str, ...] | None = None
    class_names: str | tuple[str, ...] | None = None
    tfds_class_names: str | None = None
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    form: str = ""

    def load_templates(self) -> tuple[str, ...] | None:
        """The templates; read from an installed package where they are a set's name."""
        words = self.templates
        return prompts.parse_templates(words) if isinstance(words, str) else words

    def load_class_names(self, is_tfds: bool) -> tuple[str, ...] | None:
        """The class names; read from an installed package where they are a set's name.

        Args:
            is_tfds: whether the source is one of TFDS.
        """
        words = self.class_names or (self.tfds_class_names if is_tfds else None)
        if words == IMAGENET:
            return prompts.imagenet_prompts()[0]
        return prompts.benchmark_class_names(words) if isinstance(words, str) else words


def _classes(split: str, source: str = NO_SOURCE, words: str = "", **fields: Any) -> SuiteEntry:
    """A classification; `words` names clip_benchmark's prompts."""
    fields = {"templates": f"clip_benchmark:{words}" if words else None, "metrics": TOP1, **fields}
    return SuiteEntry(CLASSIFICATION, source, split=split, **fields)


def _shifted_imagenet(source: str, split: str, *, with_images: bool = False) -> SuiteEntry:
    """Other pictures of ImageNet's classes; of some sets only those that have images compete."""
    options = {"candidates": "with_images"} if with_images else {}
    words = {"templates": IMAGENET, "class_names": IMAGENET}
    return _classes(split, source, numbers=0, options=options, **words)


def _retrieval(split: str, form: str = "", source: str = NO_SOURCE, **options: str) -> SuiteEntry:
    return SuiteEntry(
        RETRIEVAL,
        source,
        BOTH_WAYS,
        split=split,
        numbers=2,
        source_options=options,
        form=form,
    )


def _choice(split: str, form: str, *, macro: bool = False, **options: Any) -> SuiteEntry:
    """A choice between captions."""
    metrics = ("macro_accuracy", "accuracy") if macro else ("accuracy",)
    return SuiteEntry(
        "caption_choice", NO_SOURCE, metrics, split=split, numbers=0, options=options, form=form
    )


def _sugarcrepe(subset: str, size: int) -> SuiteEntry:
    """One of SugarCrepe's seven subsets, and the number of its questions."""
    return _choice(
        f"the {size:,} questions of {subset}.json",
        f"sugarcrepe:DIR/{subset}.json?image_root=val2017, SugarCrepe's file and COCO's pictures",
    )


SUITE: dict[str, SuiteEntry] = {
    "birdsnap": _classes(
        "its test split (test_images.txt)",
        templates=("a photo of a {}, a type of bird.",),
        form="list:DIR/test_images.txt?image_root=DIR/images, Birdsnap's list and its pictures",
    ),
    "cifar10": _classes(
        "test", "tfds:cifar10:test", "cifar10", class_names=prompts.CIFAR10_CLASSES
    ),
    "cifar100": _classes(
        "test", "tfds:cifar100:test", "cifar100", source_options={"caption_feature": "label"}
    ),
    "caltech101": _classes(
        "test of TFDS (30 images a class are its training split; the background is a class)",
        "tfds:caltech101:test",
        "caltech101",
        metrics=PER_CLASS,
        tfds_class_names="caltech101_vtab",
    ),
    "country211": _classes(
        "its test split (the folder `test` of CLIP's country211.tgz, 100 images a country)",
        words="country211",
        class_names="country211",
        form="DIR, a folder with one sub-folder per class, or clip_benchmark:DIR",
    ),
    "dtd": _classes("test of the first of its ten divisions", "tfds:dtd:test", "dtd"),
    "flowers102": _classes(
        "test",
        "tfds:oxford_flowers102:test",
        "flowers",
        metrics=PER_CLASS,
        tfds_class_names="flowers",
    ),
    "food101": _classes("test, which TFDS calls validation", "tfds:food101:validation", "food101"),
    "imagenet": _classes(
        "validation", "tfds:imagenet2012:validation", templates=IMAGENET, class_names=IMAGENET
    ),
    "oxford_pets": _classes(
        "test",
        "tfds:oxford_iiit_pet:test",
        "pets",
        metrics=PER_CLASS,
        tfds_class_names="pets",
        source_options={"image_feature": "image", "caption_feature": "label"},
    ),
    "stl10": _classes("test", "tfds:stl10:test", "stl10"),
    "sun397": _classes(
        "test of the first standard partition (19,850 images)",
        "tfds:sun397/standard-part1-120k:test",
        "sun397",
    ),
    "stanford_cars": _classes("test", "tfds:cars196:test", "cars"),
    "ucf101": _classes(
        "the middle frame of every test clip, the mean over the three test splits",
        templates=prompts.UCF101_TEMPLATES,
        class_names=prompts.UCF101_CLASSES,
        source_options={"splits": "1,2,3"},
        form="list:DIR/testlist{:02}.txt?image_root=FRAMES, UCF-101's lists and its frames",
    ),
    "hateful_memes": SuiteEntry(
        "binary",
        NO_SOURCE,
        ("auroc",),
        split="the 500 memes of dev_seen.jsonl",
        templates=("a {}.",),
        class_names=("meme", "hatespeech meme"),
        source_options={"image_column": "img", "caption_column": "text"},
        form="DIR/dev_seen.jsonl, with DIR/img next to it",
    ),
    "voc2007": SuiteEntry(
        MULTILABEL,
        NO_SOURCE,
        ("mean_average_precision",),
        split="test (4,952 images, 20 classes)",
        templates="clip_benchmark:voc2007_multilabel",
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
        templates=prompts.PLAIN_TEMPLATES,
        form=(
            "open_images:DIR, with validation-annotations-human-imagelabels-boxable.csv, "
            "class-descriptions-boxable.csv and the pictures in DIR/validation"
        ),
    ),
    "coco_retrieval": _retrieval(
        "Karpathy and Li's test split (5,000 images)",
        source="tfds:coco_captions:test",
        caption_feature="captions/text",
    ),
    "flickr30k_retrieval": _retrieval(
        "Karpathy and Li's test split (1,000 images with 5 captions each)",
        "flickr30k_test.json?image_root=DIR, ALBEF's file and Flickr30K's images",
    ),
    "localized_narratives_coco": _retrieval(
        "the narratives on COCO's val2017",
        "coco_val_localized_narratives.jsonl?image_root=DIR, with COCO's val2017 in DIR",
        image_column="image_id",
        image_name="{:0>12}.jpg",
    ),
    "localized_narratives_flickr": _retrieval(
        "the narratives on Flickr30K's test split",
        "flickr30k_test_localized_narratives.jsonl?image_root=DIR, with Flickr30K's images",
        image_column="image_id",
        image_name="{}.jpg",
    ),
    "winoground": SuiteEntry(
        "winoground",
        NO_SOURCE,
        ("image", "text", "group"),
        split="all 400 examples",
        numbers=2,
        form="DIR/examples.jsonl, with DIR/images next to it",
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
    "objectnet": _classes(
        "the pictures of the 113 classes that it shares with ImageNet",
        numbers=0,
        templates=IMAGENET,
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
