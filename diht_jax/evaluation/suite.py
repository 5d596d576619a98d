"""The tasks that are known by name: the zero-shot suite of DiHT.

Called by `task_specs`. The list is the one of DiHT, arXiv 2301.02280, section "Evaluation", as far
as it is known to us: 17 classifications, retrieval both ways on 5 sets (10 numbers) and 2 on
questions. Sources are TFDS where it has the images and labels that the task needs, else
`NO_SOURCE`: then the user gives one, and `form` says how it is given. Class names that are not
given here come with the data. Templates are CLIP's, read from installed packages (`prompts`).

Ours: the templates of the sets that clip-benchmark lacks (Birdsnap, UCF-101, Hateful Memes, Open
Images), and mean average precision over all points for the sets with several labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from diht_jax.evaluation import prompts
from diht_jax.evaluation.answers import ANSWER_TEMPLATE, ENTAILMENT_PROMPTS

CLASSIFICATION = "classification"
MULTILABEL = "multilabel"
BINARY = "binary"
RETRIEVAL = "retrieval"
WINOGROUND = "winoground"
ENTAILMENT = "entailment"
VQA = "vqa"

NO_SOURCE = ""


@dataclasses.dataclass(frozen=True)
class SuiteEntry:
    """A task by name.

    Attributes:
        kind: of `task_specs.KINDS`.
        source: of `sources`, or `NO_SOURCE`.
        numbers: how many of the 29 it gives.
        metrics: the first is the one that DiHT reports.
        templates: makes the templates; the kind's own where None.
        class_names: makes the class names; they come with the data where None.
        tfds_class_names: makes better ones for a TFDS source, in the order of its labels.
        source_options: of the source.
        form: how a source of one's own is given, where there is none.
    """

    kind: str
    source: str
    metrics: tuple[str, ...]
    numbers: int = 1
    templates: Callable[[], tuple[str, ...]] | None = None
    class_names: Callable[[], tuple[str, ...]] | None = None
    tfds_class_names: Callable[[], tuple[str, ...]] | None = None
    source_options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    form: str = ""


def _templates(name: str) -> Callable[[], tuple[str, ...]]:
    return lambda: prompts.benchmark_templates(name)


def _names(name: str) -> Callable[[], tuple[str, ...]]:
    return lambda: prompts.benchmark_class_names(name)


_FOLDER = "clip_benchmark:DIR, or a folder of classes"
_TOP1 = ("top1", "top5", "mean_per_class")
_BOTH_WAYS = ("t2i_r1", "i2t_r1")

SUITE: dict[str, SuiteEntry] = {
    "birdsnap": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        templates=lambda: ("a photo of a {}, a type of bird.",),
        form=_FOLDER,
    ),
    "cifar10": SuiteEntry(
        CLASSIFICATION,
        "tfds:cifar10:test",
        _TOP1,
        templates=lambda: prompts.CIFAR10_TEMPLATES,
        class_names=lambda: prompts.CIFAR10_CLASSES,
    ),
    "cifar100": SuiteEntry(
        CLASSIFICATION,
        "tfds:cifar100:test",
        _TOP1,
        templates=_templates("cifar100"),
        source_options={"caption_feature": "label"},
    ),
    "caltech101": SuiteEntry(
        CLASSIFICATION,
        "tfds:caltech101:test",
        ("mean_per_class", "top1"),
        templates=_templates("caltech101"),
        tfds_class_names=_names("caltech101_vtab"),
    ),
    "country211": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        templates=_templates("country211"),
        class_names=_names("country211"),
        form=_FOLDER,
    ),
    "dtd": SuiteEntry(CLASSIFICATION, "tfds:dtd:test", _TOP1, templates=_templates("dtd")),
    "flowers102": SuiteEntry(
        CLASSIFICATION,
        "tfds:oxford_flowers102:test",
        ("mean_per_class", "top1"),
        templates=_templates("flowers"),
        tfds_class_names=_names("flowers"),
    ),
    "food101": SuiteEntry(
        CLASSIFICATION, "tfds:food101:validation", _TOP1, templates=_templates("food101")
    ),
    "imagenet": SuiteEntry(
        CLASSIFICATION,
        "tfds:imagenet2012:validation",
        _TOP1,
        templates=lambda: prompts.imagenet_prompts()[1],
        class_names=lambda: prompts.imagenet_prompts()[0],
    ),
    "oxford_pets": SuiteEntry(
        CLASSIFICATION,
        "tfds:oxford_iiit_pet:test",
        ("mean_per_class", "top1"),
        templates=_templates("pets"),
        source_options={"image_feature": "image", "caption_feature": "label"},
    ),
    "stl10": SuiteEntry(CLASSIFICATION, "tfds:stl10:test", _TOP1, templates=_templates("stl10")),
    "sun397": SuiteEntry(CLASSIFICATION, "tfds:sun397:test", _TOP1, templates=_templates("sun397")),
    "stanford_cars": SuiteEntry(
        CLASSIFICATION, "tfds:cars196:test", _TOP1, templates=_templates("cars")
    ),
    "ucf101": SuiteEntry(
        CLASSIFICATION,
        NO_SOURCE,
        _TOP1,
        templates=lambda: ("a photo of a person doing {}.",),
        form=f"{_FOLDER}, with the middle frame of every clip",
    ),
    "hateful_memes": SuiteEntry(
        BINARY,
        NO_SOURCE,
        ("auroc",),
        templates=lambda: ("a {}.",),
        class_names=lambda: ("meme", "hateful meme"),
        source_options={"image_column": "img", "caption_column": "text"},
        form="its dev_seen.jsonl",
    ),
    "voc2007": SuiteEntry(
        MULTILABEL,
        NO_SOURCE,
        ("mean_average_precision",),
        templates=_templates("voc2007_multilabel"),
        form="clip_benchmark:DIR with dataset_type multilabel",
    ),
    "open_images": SuiteEntry(
        MULTILABEL,
        NO_SOURCE,
        ("mean_average_precision",),
        templates=lambda: prompts.PLAIN_TEMPLATES,
        form="clip_benchmark:DIR with dataset_type multilabel",
    ),
    # The 5,000 images of Karpathy and Li's test split.
    "coco_retrieval": SuiteEntry(
        RETRIEVAL,
        "tfds:coco_captions:test",
        _BOTH_WAYS,
        numbers=2,
        source_options={"caption_feature": "captions/text"},
    ),
    "flickr30k_retrieval": SuiteEntry(
        RETRIEVAL,
        NO_SOURCE,
        _BOTH_WAYS,
        numbers=2,
        form="annotations:flickr30k_test.json?image_root=DIR (ALBEF's)",
    ),
    "localized_narratives_coco": SuiteEntry(
        RETRIEVAL,
        NO_SOURCE,
        _BOTH_WAYS,
        numbers=2,
        source_options={"image_column": "image_id", "image_name": "{:0>12}.jpg"},
        form="annotations:coco_val_localized_narratives.jsonl?image_root=DIR",
    ),
    "localized_narratives_flickr": SuiteEntry(
        RETRIEVAL,
        NO_SOURCE,
        _BOTH_WAYS,
        numbers=2,
        source_options={"image_column": "image_id", "image_name": "{}.jpg"},
        form="annotations:flickr30k_test_localized_narratives.jsonl?image_root=DIR",
    ),
    "winoground": SuiteEntry(
        WINOGROUND,
        NO_SOURCE,
        ("image", "text", "group"),
        numbers=2,
        form="winoground:examples.jsonl",
    ),
    "snli_ve": SuiteEntry(
        ENTAILMENT,
        NO_SOURCE,
        ("accuracy",),
        templates=lambda: tuple(ENTAILMENT_PROMPTS.values()),
        source_options={"image_name": "{}.jpg"},
        form="annotations:ve_test.json?image_root=DIR (ALBEF's)",
    ),
    "vqav2": SuiteEntry(
        VQA,
        NO_SOURCE,
        ("accuracy",),
        templates=lambda: (ANSWER_TEMPLATE,),
        form="annotations:vqa_val.json?image_root=DIR&class_names=answer_list.json (ALBEF's)",
    ),
}
