"""Config of `data_prep.label`: every key with its default, and checks of the values.

The sections of the teachers are defined next to their code, in `data_prep.teachers`.
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

# Formats that can store concepts in their records.
_OUTPUT_FORMATS = ("tfrecord", "array_record")

# Our choice: words in captions that no image shows, or that every image shows.
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
    "input": str,  # output folder of data_prep.filter, or several separated by commas
    "output": str,  # folder of the labels
    # Write new shards with labels in every record, instead of separate files of labels. A folder
    # that already has such shards continues with them.
    "merge": False,
    "output_format": "tfrecord",  # format of merged shards; or "array_record"
    "dataset_name": "pairs",  # first part of the names of merged shards, before the split
    "split": "train",  # second part of these names
    "concepts": True,  # make concept labels; False: only CLIP embeddings
    "vocabulary.min_count": Key(10, COUNT),  # minimum number of pairs that mention a concept
    "vocabulary.max_objects": Key(10_000, Range(0, MAX_CONCEPT_ID + 1)),  # the most frequent ones
    "vocabulary.max_attributes": Key(2_000, Range(0, MAX_CONCEPT_ID + 1)),  # the most frequent ones
    "vocabulary.stop_objects": _STOP_OBJECTS,  # excluded from the vocabulary
    "vocabulary.stop_attributes": _STOP_ATTRIBUTES,  # excluded from the vocabulary
    "heads.load": str,  # folder whose heads are used instead of new ones
    "heads.steps": Key(2000, COUNT),  # maximum; training may stop early
    "heads.batch_size": Key(1024, COUNT),  # images per step
    "heads.learning_rate": 1e-3,  # peak; cosine decay to zero
    # L2 penalty, given as a prior: expected standard deviation of the logits before any training;
    # large values disable the penalty. It matters if images are few; 2.5 was the best of the values
    # tried for 1,280 dimensions.
    "heads.prior_logit_std": Key(2.5, POSITIVE),
    # Concepts in a smaller share of the images are up-sampled by sqrt(threshold / share); 1: all.
    "heads.repeat_threshold": Key(1.0, SHARE_NOT_0),
    # Share of the images that are held out, chosen by their keys.
    "heads.held_out": Key(0.1, Range(0, 1, excludes_low=True, excludes_high=True)),
    "heads.max_examples": Key(2_000_000, COUNT),  # for training; sampled if there are more images
    "heads.max_held_out": Key(20_000, COUNT),  # maximum number of images for metrics
    # Keep the heads while at most this many shards changed since the training: a share below 1, or
    # a number. Otherwise, heads are trained again, and every shard is labelled again.
    "heads.max_changed_shards": Key(0.01, NOT_NEGATIVE),
    "embedding_dtype": Key("float16", OneOf(DTYPES)),  # of the stored embeddings; or "float32"
    "top_k": Key(10, Range(1, MAX_CONCEPTS)),  # objects, and attributes, stored per image
    # GB of local disk for embeddings that are written to a store and read again in the same run.
    "scratch_gb": Key(8.0, NOT_NEGATIVE),
    "report_images": Key(36, NOT_NEGATIVE),  # images in report.html
    # Seed of the held-out split, the order of training and the images of the report.
    "seed": Key(0, NOT_NEGATIVE),
}

OPTIONAL_KEYS = ("teacher.swag.architecture",)  # may be None, which is not their default

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
    """Returns a labelling config with every key at its default."""
    c = build_config(KEYS)
    c.clip_teachers = clip.default_config()  # CLIP models whose embeddings are stored for training
    c.teacher = default_teacher()
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks the values of a config.

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
