"""The config of the filter: its keys, its checks, and the hash of all that decides what is written.

`filter.py`, `cat.py` and `configs/prep/` use it. What the keys do belongs in `cat.py`,
`metadata_filter.py` and `resharding.py`.
"""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.jobs import shards
from data_prep.jobs.engine import RaySettings
from data_prep.sources.list import default_source
from data_prep.text_spotting import config as spotter_config
from data_prep.text_spotting.weights import easyocr_version
from diht_jax.data.images import decode

# Raised whenever the same config comes to mean other records.
_FORMAT_VERSION = 4
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
_CAPTION_MODULES = ("../captions/*.py",)
_SPOTTING_MODULES = (
    "../text_spotting/spotter.py",
    "../text_spotting/match.py",
    "../text_spotting/ocr.py",
)


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
    """All that decides what is written, the rules and the versions included; JSON-able.

    Raises:
        ValueError: text-spotting is asked for, and EasyOCR is not installed.
    """
    settings = record_settings(config)
    settings["format_version"] = _FORMAT_VERSION
    if parses_captions(config):
        settings["caption_rules"] = _hash_modules(_CAPTION_MODULES)
    if config.text_spotting:
        settings["spotting_rules"] = _hash_modules(_SPOTTING_MODULES)
        settings["easyocr"] = easyocr_version()
    return settings


def hash_config(config: ml_collections.ConfigDict) -> str:
    """The fingerprint of `describe_settings`.

    Raises:
        ValueError: text-spotting is asked for, and EasyOCR is not installed.
    """
    return shards.hash_config(describe_settings(config))


def _hash_modules(patterns: Sequence[str]) -> str:
    # Otherwise a run after a change of the rules would take the shards of before for its own.
    folder = pathlib.Path(__file__).parent
    rules = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in rules)).hexdigest()


def parses_captions(config: ml_collections.ConfigDict) -> bool:
    """Whether the captions matter; otherwise the parser is not even loaded."""
    return drops_captions(config) or config.concepts


def drops_captions(config: ml_collections.ConfigDict) -> bool:
    """Whether captions can be a reason to drop a pair."""
    return config.complexity or config.action


def caption_limits(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """C and A as arguments of `captions.cat_reason`."""
    return {
        "min_complexity": config.min_complexity if config.complexity else 0,
        "require_action": config.action,
    }
