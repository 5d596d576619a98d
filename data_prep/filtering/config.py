"""The config of the filter: its keys, its checks, and the hash of all that decides what is written.

What the keys do belongs in `shard`, `metadata` and `resharding`.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.captions import versions as caption_versions
from data_prep.jobs import shards
from data_prep.jobs.engine import RaySettings
from data_prep.sources.list import default_source
from data_prep.text_spotting import config as spotter_config
from data_prep.text_spotting.weights import easyocr_version
from diht_jax.data.images import decode

# Raised whenever the same config comes to mean other records.
_FORMAT_VERSION = 4
# Recorded versions that must not change while a folder is filled, see `package_versions`.
DECIDING_PACKAGES = ("spacy_model",)
# Of the config, what says where, how fast and in which portions, but not what is written of a pair.
_NOT_HASHED = (
    "input",
    "output",
    "num_workers",
    "retries",
    "batch_size",
    "ray",
    "examples_per_shard",
    "keep_parts",
    "clean_label",
)
# Folders that were filtered before the rules had versions were hashed with digests of the rules'
# source code. These two mean version 1, and version 1 goes on to be hashed as them, so that such
# folders are recognised.
_DIGESTS_OF_VERSION_1 = {
    "caption_rules": "947b331d88dcbba05ef3b1aa118324f52bb19d07ec7ef5de25b9bc904598522d",
    "spotting_rules": "5fb768f15315445486dfa738e7d08d516284d3302c62ab5ea5005a76f2d86a09",
}


def default_config() -> ml_collections.ConfigDict:
    """Every key of a filter config, with its default."""
    c = ml_collections.ConfigDict()
    c.input = placeholder(str)  # any source of docs/data.md; several are separated by commas
    c.output = placeholder(str)  # folder of the shards
    c.source = default_source()
    c.dataset_name = "pairs"  # with the split it makes the names of the shards
    c.split = "train"

    c.complexity = True  # C of CAT: drop captions of a complexity under min_complexity
    c.min_complexity = 1
    c.action = True  # A of CAT: drop captions without an action
    c.text_spotting = True  # T of CAT: drop captions that their picture shows as text
    c.spotter = spotter_config.default_spotter()
    c.concepts = True  # count and keep objects and attributes of the captions, for data_prep.label

    c.image = ml_collections.ConfigDict()
    c.image.max_pixels = decode.MAX_PIXELS  # width times height; larger ones are not decoded
    c.image.min_side = 1  # px; smaller ones are dropped
    c.image.max_side = placeholder(
        int
    )  # px; larger ones are shrunk and written as JPEG; None keeps all bytes
    c.image.jpeg_quality = 90  # of those that are shrunk

    c.metadata_only = False  # rows of parquet or jsonl in and out, C and A only, no images

    c.drop_metadata = ("exif",)  # fields that are not worth their bytes
    c.examples_per_shard = 10_000  # about so many records make one output shard
    c.keep_parts = False  # keep what was filtered of every input shard, once it was re-sharded
    c.samples_per_outcome = 50  # examples in the statistics, to look at
    c.report_samples = 8  # examples of each outcome in the report, with pictures
    c.label_field = placeholder(str)  # field of the metadata by whose values pairs are counted
    c.clean_label = "clean"  # the value of good pairs; all others are noise that should go
    c.seed = 0  # of the choice of examples

    c.num_workers = placeholder(int)  # processes; None: one per core, 0: no other process
    c.retries = 1  # how often a shard is tried again when its worker died, or the disk failed
    c.batch_size = 256  # pairs whose captions are parsed together
    c.ray = ml_collections.ConfigDict()  # for --engine=ray
    ray = RaySettings()
    c.ray.address = ray.address  # "auto": the running cluster, "local": started for this job
    c.ray.cpus_per_worker = ray.cpus_per_worker
    c.ray.gpus_per_worker = ray.gpus_per_worker
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    least = {
        "min_complexity": (config.min_complexity, 0),
        "image.max_pixels": (config.image.max_pixels, 1),
        "image.min_side": (config.image.min_side, 1),
        "image.max_side": (config.image.max_side, 1),
        "examples_per_shard": (config.examples_per_shard, 1),
        "retries": (config.retries, 0),
        "samples_per_outcome": (config.samples_per_outcome, 0),
        "report_samples": (config.report_samples, 0),
        "batch_size": (config.batch_size, 1),
    }
    for name, (value, minimum) in least.items():
        if value is not None and (not isinstance(value, int) or value < minimum):
            raise ValueError(f"config.{name}={value!r}; expected an integer of at least {minimum}")
    spotter_config.check_spotter(config.spotter)
    if not 1 <= config.image.jpeg_quality <= 95:
        raise ValueError(f"config.image.jpeg_quality={config.image.jpeg_quality}; expected 1 to 95")


def record_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The part of the config that decides what is written, as plain JSON-able values."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_HASHED}
    spotter = settings.pop("spotter")
    if config.text_spotting:
        not_hashed = spotter_config.NOT_HASHED
        settings["spotter"] = {k: v for k, v in spotter.items() if k not in not_hashed}
    return settings


def describe_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """All that decides what is written, and so is hashed: config, rules, EasyOCR; JSON-able.

    Of the packages only EasyOCR's version is hashed. The others are in `package_versions`.

    Raises:
        ValueError: text-spotting is asked for, and EasyOCR is not installed.
    """
    settings = record_settings(config)
    settings["format_version"] = _FORMAT_VERSION
    if parses_captions(config):
        settings["caption_rules"] = caption_versions.RULES_VERSION
    if config.text_spotting:
        settings["spotting_rules"] = spotter_config.RULES_VERSION
        settings["easyocr"] = easyocr_version()
    return settings


def hash_settings(settings: dict[str, Any]) -> str:
    """The fingerprint of what `describe_settings` gave."""
    as_before = {k: v for k, v in _DIGESTS_OF_VERSION_1.items() if settings.get(k) == 1}
    return shards.hash_config(settings | as_before)


def upgrade_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of an older folder in today's form: digests of the rules become versions."""
    known = {k: 1 for k, digest in _DIGESTS_OF_VERSION_1.items() if settings.get(k) == digest}
    return settings | known


def hash_config(config: ml_collections.ConfigDict) -> str:
    """The fingerprint of `describe_settings`.

    Raises:
        ValueError: text-spotting is asked for, and EasyOCR is not installed.
    """
    return hash_settings(describe_settings(config))


def package_versions(config: ml_collections.ConfigDict) -> dict[str, str]:
    """The versions of the packages that take part, for the statistics of every shard.

    They are recorded and not hashed. What another version of them means for a folder that is not
    finished: another model of spaCy is refused like another config, since it gives other graphs
    (`DECIDING_PACKAGES`). Another version of spaCy, py3langid or Pillow seldom decides otherwise,
    so the job goes on, and the report warns of shards that were made with unlike versions. Shards
    of before versions were recorded are taken as they are.

    Raises:
        ValueError: a package that the config needs is not installed.
    """
    versions = {}
    if parses_captions(config):
        versions |= caption_versions.package_versions()
    if config.text_spotting:
        versions["easyocr"] = easyocr_version()
    if not config.metadata_only:
        versions["pillow"] = importlib.metadata.version("pillow")
    return versions


def parses_captions(config: ml_collections.ConfigDict) -> bool:
    """Whether the captions matter; otherwise the parser is not even loaded."""
    return drops_captions(config) or config.concepts


def drops_captions(config: ml_collections.ConfigDict) -> bool:
    """Whether captions can be a reason to drop a pair."""
    return config.complexity or config.action


def caption_limits(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """C and A as arguments of `graph.cat_reason`."""
    return {
        "min_complexity": config.min_complexity if config.complexity else 0,
        "require_action": config.action,
    }
