"""The config of `data_prep.label`: every key with its default, and the checks of their ranges.

The sections of the teachers are next to their code, in `data_prep.teachers`.
"""

from __future__ import annotations

import dataclasses

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.jobs.engine import RaySettings
from data_prep.jobs.failures import check_limit
from data_prep.teachers import clip
from data_prep.teachers.registry import default_teacher
from diht_jax.records.formats.registry import check_format
from diht_jax.records.schema import MAX_CONCEPTS

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


def default_config() -> ml_collections.ConfigDict:
    """Every key of a labelling config, with its default."""
    c = ml_collections.ConfigDict()
    c.input = placeholder(str)  # folder (or several, with commas) of data_prep.filter
    c.output = placeholder(str)  # folder of the labels
    # Whether the output gets shards with labels in every record, rather than files of labels alone.
    # A folder that has such shards goes on to.
    c.merge = False
    c.output_format = "tfrecord"  # or "array_record": of merged shards
    c.dataset_name = "pairs"  # with the split it makes the names of merged shards
    c.split = "train"

    c.concepts = True  # whether there are to be concept labels; False: CLIP embeddings alone
    c.clip_teachers = clip.default_config()  # CLIPs whose embeddings are kept for training

    c.vocabulary = ml_collections.ConfigDict()
    c.vocabulary.min_count = 10  # pairs that must mention a concept
    c.vocabulary.max_objects = 10_000  # the most frequent ones
    c.vocabulary.max_attributes = 2_000
    c.vocabulary.stop_objects = _STOP_OBJECTS  # never concepts
    c.vocabulary.stop_attributes = _STOP_ATTRIBUTES

    c.teacher = default_teacher()
    c.embedding_dtype = "float16"  # of the kept embeddings; or "float32"
    c.heads = default_heads()
    c.top_k = 10  # objects, and attributes, that are kept of each image

    # GB on the local disk for embeddings that go to a store and are read again in the same run.
    c.scratch_gb = 8.0

    c.report_images = 36  # in report.html
    c.seed = 0  # of the held-out images, the order of training and the report's images
    c.num_workers = placeholder(int)  # processes; None: one per core, 0: no other process
    # Failed shards that the labels are written without: a share below 1 (0: none; else one at
    # least), or a number.
    c.max_failed_shards = 0.01
    # Shards that are gone whose labels and embeddings are removed; where they are more, all
    # stay. A share below 1, or a number.
    c.max_changed_shards = 0.01
    c.retries = 1  # how often a shard is run again when its worker died, or its storage failed
    # Seconds after which the worker of a shard is stopped; the second time the shard has failed.
    c.shard_timeout_secs = placeholder(float)
    c.ray = ml_collections.ConfigDict(dataclasses.asdict(RaySettings()))  # see data_prep.filter
    return c


def default_heads() -> ml_collections.ConfigDict:
    """The config section `heads`."""
    c = ml_collections.ConfigDict()
    c.load = placeholder(str)  # folder whose heads are taken over
    c.steps = 2000  # at most
    c.batch_size = 1024  # images drawn for each step
    c.learning_rate = 1e-3  # peak; falls to zero by a cosine
    # An L2 penalty, as a prior: the deviation of logits that is expected before any image is seen.
    # It matters where images are few; for 1,280 dimensions 2.5 was the best of those tried.
    c.prior_logit_std = 2.5
    # Share of the images above which a concept is not up-sampled; 1: all are, by 1 / sqrt(share).
    c.repeat_threshold = 1.0
    c.held_out = 0.1  # share of the images, chosen by their keys
    c.max_examples = 2_000_000  # images that are trained on; more are sampled
    c.max_held_out = 20_000  # images that metrics are measured on
    # The heads stay while at most this many shards changed since they were made: a share below 1,
    # or a number. Above, they are trained again, and every shard is labelled again.
    c.max_changed_shards = 0.01
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks the ranges of values.

    Raises:
        ValueError: a value is out of its range.
    """
    check_format(config.output_format, _OUTPUT_FORMATS)
    RaySettings(**config.ray.to_dict()).check()
    clip.check_config(config.clip_teachers)
    if not config.concepts and not config.clip_teachers.models:
        raise ValueError(
            "config.concepts=False: nothing is left to do; name config.clip_teachers.models"
        )
    if config.merge and config.clip_teachers.models:
        raise ValueError(
            "config.merge=True: embeddings of CLIPs are stored next to the shards of the input and "
            "cannot be merged into new ones; label without it"
        )
    check_limit("max_failed_shards", config.max_failed_shards)
    check_limit("max_changed_shards", config.max_changed_shards)
    check_limit("heads.max_changed_shards", config.heads.max_changed_shards)
    heads = config.heads
    least = {
        "vocabulary.min_count": (config.vocabulary.min_count, 1),
        "vocabulary.max_objects": (config.vocabulary.max_objects, 0),
        "vocabulary.max_attributes": (config.vocabulary.max_attributes, 0),
        "heads.steps": (heads.steps, 1),
        "heads.batch_size": (heads.batch_size, 1),
        "heads.max_examples": (heads.max_examples, 1),
        "heads.max_held_out": (heads.max_held_out, 1),
        "teacher.batch_size": (config.teacher.batch_size, 1),
        "top_k": (config.top_k, 1),
        "report_images": (config.report_images, 0),
        "retries": (config.retries, 0),
        "scratch_gb": (config.scratch_gb, 0),
    }
    for name, (value, minimum) in least.items():
        if value is not None and value < minimum:
            raise ValueError(f"config.{name}={value!r}; expected at least {minimum}")
    if config.top_k > MAX_CONCEPTS:
        raise ValueError(f"config.top_k={config.top_k}; a record keeps at most {MAX_CONCEPTS}")
    if heads.prior_logit_std <= 0:
        raise ValueError(
            f"config.heads.prior_logit_std={heads.prior_logit_std}; expected a positive number, a "
            "large one for no penalty"
        )
    for name, value in (
        ("heads.held_out", heads.held_out),
        ("heads.repeat_threshold", heads.repeat_threshold),
    ):
        if not 0 < value <= 1 or (name == "heads.held_out" and value == 1):
            raise ValueError(f"config.{name}={value}; expected a share of the images, such as 0.1")
