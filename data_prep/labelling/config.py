"""The config of `data_prep.label`: every key with its default, and the checks of their ranges.

The sections of the teachers are next to their code, in `data_prep.teachers`.
"""

from __future__ import annotations

from typing import Any

import ml_collections

from data_prep.jobs import failures
from data_prep.labelling.embeddings import DTYPES
from data_prep.teachers import clip
from data_prep.teachers.registry import default_teacher
from diht_jax.config.checks import check_unset
from diht_jax.config.keys import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE_NOT_0,
    Key,
    OneOf,
    Range,
    build_config,
    check_ranges,
)
from diht_jax.records.formats import check_format
from diht_jax.records.schema import MAX_CONCEPT_ID, MAX_CONCEPTS

# Those that have room for concepts.
_OUTPUT_FORMATS = ("tfrecord", "array_record")

# Ours: what captions speak of, but no picture shows, or every picture does.
_STOP_OBJECTS = (
    "array", "assortment", "background", "bit", "close-up", "collection", "copy", "credit", "day",
    "detail", "example", "file", "illustration", "image", "item", "kind", "letter", "lot", "one",
    "part", "photo", "photograph", "picture", "piece", "place", "range", "selection", "set", "shot",
    "sort", "stock", "thing", "time", "type", "variety", "version", "view", "way",
)  # fmt: skip
_STOP_ATTRIBUTES = (
    "available", "best", "called", "certain", "different", "digital", "favorite", "free", "good",
    "great", "high", "known", "last", "more", "named", "new", "next", "official", "original",
    "other", "own", "possible", "same", "similar", "special", "such", "top", "unidentified",
    "various",
)  # fmt: skip


KEYS: dict[str, Any] = failures.KEYS | {
    "input": str,  # folder (or several, with commas) of data_prep.filter
    "output": str,  # folder of the labels
    # Whether the output gets shards with labels in every record, rather than files of labels alone.
    # A folder that has such shards goes on to.
    "merge": False,
    "output_format": "tfrecord",  # or "array_record": of merged shards
    "dataset_name": "pairs",  # with the split it makes the names of merged shards
    "split": "train",  # the second part of these names
    "concepts": True,  # whether there are to be concept labels; False: CLIP embeddings alone
    "vocabulary.min_count": Key(10, COUNT),  # pairs that must mention a concept
    "vocabulary.max_objects": Key(10_000, Range(0, MAX_CONCEPT_ID + 1)),  # the most frequent ones
    "vocabulary.max_attributes": Key(2_000, Range(0, MAX_CONCEPT_ID + 1)),  # likewise
    "vocabulary.stop_objects": _STOP_OBJECTS,  # never concepts
    "vocabulary.stop_attributes": _STOP_ATTRIBUTES,  # never concepts
    "heads.load": str,  # folder whose heads are taken over
    "heads.steps": Key(2000, COUNT),  # at most
    "heads.batch_size": Key(1024, COUNT),  # images drawn for each step
    "heads.learning_rate": 1e-3,  # peak; falls to zero by a cosine
    # An L2 penalty, as a prior: the deviation of logits that is expected before any image is seen;
    # a large one is no penalty. It matters where images are few; for 1,280 dimensions 2.5 was the
    # best of those tried.
    "heads.prior_logit_std": Key(2.5, POSITIVE),
    # Share of the images above which a concept is not up-sampled; 1: all are, by 1 / sqrt(share).
    "heads.repeat_threshold": Key(1.0, SHARE_NOT_0),
    # Share of the images, chosen by their keys.
    "heads.held_out": Key(0.1, Range(0, 1, excludes_low=True, excludes_high=True)),
    "heads.max_examples": Key(2_000_000, COUNT),  # images that are trained on; more are sampled
    "heads.max_held_out": Key(20_000, COUNT),  # images that metrics are measured on
    # The heads stay while at most this many shards changed since they were made: a share below 1,
    # or a number. Above, they are trained again, and every shard is labelled again.
    "heads.max_changed_shards": Key(0.01, NOT_NEGATIVE),
    "embedding_dtype": Key("float16", OneOf(DTYPES)),  # of the kept embeddings; or "float32"
    "top_k": Key(10, Range(1, MAX_CONCEPTS)),  # objects, and attributes, kept of each image
    # GB on the local disk for embeddings that go to a store and are read again in the same run.
    "scratch_gb": Key(8.0, NOT_NEGATIVE),
    "report_images": Key(36, NOT_NEGATIVE),  # in report.html
    # Of the held-out images, the order of training and the report's images.
    "seed": Key(0, NOT_NEGATIVE),
}

OPTIONAL_KEYS = ("teacher.swag.architecture",)  # they may be None, which is not their default

# Prefix of keys -> files whose comments describe them.
COMMENT_FILES = {
    "": "data_prep/labelling/config.py data_prep/jobs/failures.py",
    "clip_teachers.": "data_prep/teachers/clip.py",
    "teacher.": "data_prep/teachers/registry.py",
    "teacher.swag.": "data_prep/teachers/swag.py",
    "teacher.torch.": "data_prep/teachers/torch_module.py",
    "teacher.precomputed.": "data_prep/teachers/precomputed.py",
    "source.": "diht_jax/readers/*.py",
}


def default_config() -> ml_collections.ConfigDict:
    """Every key of a labelling config, with its default."""
    c = build_config(KEYS)
    c.clip_teachers = clip.default_config()  # CLIPs whose embeddings are kept for training
    c.teacher = default_teacher()
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks the ranges of values.

    Raises:
        ValueError: a value is out of its range.
    """
    check_unset(config, default_config(), OPTIONAL_KEYS)
    check_format(config.output_format, _OUTPUT_FORMATS)
    check_ranges(config, KEYS)
    clip.check_config(config.clip_teachers)
    failures.check_job(config)
    if not config.concepts and not config.clip_teachers.models:
        raise ValueError(
            "config.concepts=False: nothing is left to do; name config.clip_teachers.models"
        )
    if config.merge and config.clip_teachers.models:
        raise ValueError(
            "config.merge=True: embeddings of CLIPs are stored next to the shards of the input and "
            "cannot be merged into new ones; label without it"
        )
