"""The config of the filter: its keys, its checks, and the hash of all that decides what is written.

The keys of the steps stand in the steps' own files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.jobs import shards
from data_prep.jobs.engine import RaySettings
from data_prep.jobs.failures import check_limit
from data_prep.jobs.fingerprint import check_identity
from data_prep.sources.list import default_source
from data_prep.steps import registry
from data_prep.steps.base import check_integers
from diht_jax.records.captions import USUAL_KIND, check_kind, parse_columns
from diht_jax.records.formats.registry import check_format

# Raised whenever the same config comes to mean other records.
_FORMAT_VERSION = 4
# Recorded versions that must not change while a folder is filled, see `package_versions`.
DECIDING_PACKAGES = ("spacy_model",)
# Keys that decide where, how fast and in which portions, but not what is written of a pair.
_NOT_HASHED = (
    "input",
    "output",
    "num_workers",
    "retries",
    "shard_timeout_secs",
    "keep_before_damage",
    "batch_size",
    "ray",
    "examples_per_shard",
    "output_format",
    "keep_parts",
    "clean_label",
    "input_identity",
    "max_failed_shards",
    "max_changed_shards",
)
SETTINGS = "settings.json"  # in the folder of the parts: what the config means

# Prefix of keys -> files whose comments describe them.
COMMENT_FILES = {
    "": "data_prep/filtering/config.py data_prep/steps/*.py",
    "spotter.": "data_prep/text_spotting/*.py",
    "ray.": "data_prep/jobs/cluster.py",
    "source.": "diht_jax/readers/*.py",
}


def default_config() -> ml_collections.ConfigDict:
    """Every key of a filter config, with its default."""
    c = ml_collections.ConfigDict()
    # Any source of docs/guides/prepare/sources.md; several are separated by commas.
    c.input = placeholder(str)
    c.output = placeholder(str)  # folder of the shards
    c.source = default_source()
    c.caption_kind = USUAL_KIND  # of the captions of the input, where they state none
    # More captions in columns of the metadata, by kind, such as "synthetic=re_caption".
    c.caption_columns = ""
    # What counts as the same input, or "hash", "size"; docs/guides/prepare/shards.md.
    c.input_identity = "time"
    c.dataset_name = "pairs"  # with the split it makes the names of the shards
    c.split = "train"  # the second part of these names

    for step in registry.ordered_steps():
        step.add_defaults(c)
    c.concepts = True  # count and keep objects and attributes of the captions, for data_prep.label

    c.metadata_only = False  # rows of parquet or jsonl in and out, C and A only, no images

    c.drop_metadata = ("exif",)  # fields that are not worth their bytes
    c.output_format = "tfrecord"  # or "array_record", "webdataset": of the output shards
    # Records of an output shard, about; None: each input shard makes one.
    c.examples_per_shard = 10_000
    c.keep_parts = False  # keep what was filtered of every input shard, once it was re-sharded
    # Failed input shards that the output is written without: a share below 1 (0: none; else one
    # at least), or a number.
    c.max_failed_shards = 0.01
    # Inputs of a finished folder that may be gone or replaced without --overwrite; as above.
    c.max_changed_shards = 0.01
    c.samples_per_outcome = 50  # examples in the statistics, to look at
    c.report_samples = 8  # examples of each outcome in the report, with pictures
    c.label_field = placeholder(str)  # field of the metadata by whose values pairs are counted
    c.clean_label = "clean"  # the value of good pairs; all others are noise that should go
    c.seed = 0  # of the choice of examples

    c.num_workers = placeholder(int)  # processes; None: one per core, 0: no other process
    # How often a shard is run again when its worker died; 0: after no failure at all, not even of
    # its storage or its node, which have limits of their own.
    c.retries = 1
    # Seconds after which the worker of a shard is stopped; the second time the shard has failed.
    c.shard_timeout_secs = placeholder(float)
    c.keep_before_damage = False  # of a tar that is cut off or damaged, keep the pairs before that
    # Pairs that are read and parsed together; what C and A leave of them fills a spotter's window.
    c.batch_size = 1024
    # For --engine=ray; `jobs.cluster.RaySettings` describes each key.
    c.ray = ml_collections.ConfigDict(dataclasses.asdict(RaySettings()))
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    for name in ("max_failed_shards", "max_changed_shards"):
        check_limit(name, config[name])
    least = {"retries": 0, "samples_per_outcome": 0}
    least |= {"examples_per_shard": 1} if config.examples_per_shard is not None else {}
    least |= {"report_samples": 0, "batch_size": 1}
    check_integers({name: (config[name], minimum) for name, minimum in least.items()})
    if config.shard_timeout_secs is not None and config.shard_timeout_secs <= 0:
        raise ValueError(
            f"config.shard_timeout_secs={config.shard_timeout_secs}; expected more than 0"
        )
    caption_columns(config)
    check_kind(config.caption_kind, "config.caption_kind")
    check_format(config.output_format)
    check_identity(config.input_identity)
    if config.metadata_only and config.output_format != "tfrecord":
        raise ValueError(
            f"config.output_format='{config.output_format}' with config.metadata_only: rows of a "
            "table are written as they came; leave one of the two out"
        )
    RaySettings(**config.ray.to_dict()).check()
    for step in registry.ordered_steps():
        step.check(config)


def caption_columns(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Columns of the metadata with more captions -> their kinds."""
    return parse_columns(config.caption_columns, "config.caption_columns")


def record_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The part of the config that decides what is written, as plain JSON-able values."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_HASHED}
    for step in registry.ordered_steps():
        if step.section is not None:
            keys = settings.pop(step.section)
            if step.is_active(config):
                kept = {k: v for k, v in keys.items() if k not in step.not_hashed}
                settings[step.section] = kept
    return settings


def describe_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All that decides what is written, and so is hashed: config, rules, EasyOCR; JSON-able.

    Of the packages only EasyOCR's version is hashed. The others are in `package_versions`.

    Raises:
        ValueError: text-spotting is asked for, and EasyOCR is not installed.
    """
    settings = record_settings(config)
    settings["format_version"] = _FORMAT_VERSION
    for step in registry.ordered_steps():
        if step.is_active(config):
            settings |= step.describe_rules(config)
    return settings


def hash_config(config: ml_collections.ConfigDict) -> str:
    """The fingerprint of `describe_settings`.

    Raises:
        ValueError: text-spotting is asked for, and EasyOCR is not installed.
    """
    return shards.hash_config(describe_settings(config))


def package_versions(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The versions of the packages that take part, for the statistics of every shard.

    They are recorded and not hashed. What another version of them means for a folder that is not
    finished: another model of spaCy is refused like another config, since it gives other graphs
    (`DECIDING_PACKAGES`). Another version of spaCy, py3langid or Pillow seldom decides otherwise,
    so the job goes on, and the report warns of shards that were made with unlike versions.

    Raises:
        ValueError: a package that the config needs is not installed.
    """
    versions: dict[str, str] = {}
    for step in registry.active_steps(config):
        versions |= step.package_versions(config)
    return versions


def compare_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """Differences between two configs, such as "image.min_side 1 -> 2"."""
    if not before:
        return
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from compare_settings(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} {old} -> {new}"
