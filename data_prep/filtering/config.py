"""Config of the filter: its keys, checks, quantile limits, and the settings that are hashed.

The keys of each step are declared in the file of that step.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.decisions.table import decisions_path, find_outputs, read_decisions
from data_prep.jobs import failures, shards
from data_prep.sources import default_source
from data_prep.steps import registry
from data_prep.steps.scores import ScoreStep
from diht_jax.config.checks import check_unset
from diht_jax.config.keys import COUNT, NOT_NEGATIVE, Key, OneOf, build_config, check_ranges
from diht_jax.records.formats import check_format
from diht_jax.records.samples import USUAL_KIND, check_kind, parse_columns
from diht_jax.records.shard_files import shard_name
from diht_jax.storage import files

# Increase when the same config starts to produce different records.
_FORMAT_VERSION = 4
# Recorded versions that must not change while a folder is being filled; see `package_versions`.
DECIDING_PACKAGES = ("spacy_model",)
# Keys and sections that are not hashed: they set where and how fast a job runs and how its output
# is divided, not what is written for a pair.
_NOT_HASHED = {
    *(name.partition(".")[0] for name in failures.KEYS),
    *("input", "output", "input_identity", "keep_before_damage", "batch_size"),
    *("examples_per_shard", "output_format", "keep_parts", "clean_label"),
}
SETTINGS = "settings.json"  # in the folder of the parts: the settings that were hashed

# Prefix of keys -> files whose comments describe them.
COMMENT_FILES = {
    "": "data_prep/filtering/config.py data_prep/steps/*.py data_prep/jobs/failures.py",
    "aesthetic.": "data_prep/steps/scores.py",
    "unsafe.": "data_prep/steps/scores.py",
    "spotter.": "data_prep/text_spotting/*.py",
    "source.": "diht_jax/readers/*.py",
}


KEYS: dict[str, Any] = failures.KEYS | {
    # Input source as in docs/guides/prepare/sources.md; several are separated by commas.
    "input": str,
    "output": str,  # folder of the output shards
    "caption_kind": USUAL_KIND,  # kind of the input's captions, where the input states none
    # More captions from columns of the metadata, by kind, such as "synthetic=re_caption".
    "caption_columns": "",
    # How changed inputs are detected: "time", "hash" or "size"; docs/guides/prepare/shards.md.
    "input_identity": Key("time", OneOf(shards.IDENTITIES)),
    "dataset_name": "pairs",  # first part of the shard names, before the split
    "split": "train",  # second part of the shard names
    "concepts": True,  # count and store objects and attributes of the captions, for data_prep.label
    "metadata_only": False,  # filter rows of parquet or jsonl by C and A only, without images
    "drop_metadata": ("exif",),  # metadata fields that are not written
    "output_format": "tfrecord",  # format of the output shards; or "array_record", "webdataset"
    # Approximate number of records per output shard; None writes one output shard per input shard.
    "examples_per_shard": Key(int, COUNT),
    "keep_parts": False,  # keep the filtered parts of all input shards after resharding
    "samples_per_outcome": Key(50, NOT_NEGATIVE),  # examples of each outcome in the statistics
    "report_samples": Key(8, NOT_NEGATIVE),  # examples of each outcome in the report, with images
    "label_field": str,  # metadata field; pairs are counted by its values
    "clean_label": "clean",  # value of `label_field` for good pairs; all other values are noise
    "seed": 0,  # seed of the choice of examples
    "keep_before_damage": False,  # keep the pairs before the damage of a truncated or damaged tar
    # Pairs that are read and parsed together; those that pass C and A fill the spotter's window.
    "batch_size": Key(1024, COUNT),
}

OPTIONAL_KEYS = ("examples_per_shard",)  # may be None, which is not their default


def all_keys() -> dict[str, Any]:
    """Returns the keys of the filter and of its steps: dotted name -> a `Key`, or a default."""
    keys = dict(KEYS)
    for step in registry.ordered_steps():
        keys |= step.keys
    return keys


def default_config() -> ml_collections.ConfigDict:
    """Returns a filter config with every key at its default."""
    c = build_config(all_keys())
    c.examples_per_shard = 10_000
    c.source = default_source()
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks the values of a config beyond their types.

    Raises:
        ValueError: a value is out of its range.
    """
    check_unset(config, default_config(), OPTIONAL_KEYS)
    failures.check_job(config)
    check_ranges(config, all_keys())
    parse_columns(config.caption_columns, "config.caption_columns")
    check_kind(config.caption_kind, "config.caption_kind")
    check_format(config.output_format)
    try:
        shard_name(config.dataset_name, config.split, 0, 1)
    except ValueError as error:
        raise ValueError(f"config.dataset_name and config.split: {error}") from error
    if config.metadata_only and config.output_format != "tfrecord":
        raise ValueError(
            f"config.output_format='{config.output_format}' with config.metadata_only: rows of a "
            "table are written as they came; leave one of the two out"
        )
    for step in registry.ordered_steps():
        step.check(config)


def score_quantiles(paths: Sequence[str], name: str, shares: Sequence[float]) -> list[float] | None:
    """Computes score quantiles from files of decisions, in 4 bytes of memory per pair.

    Returns:
        For each share (0 to 1) the value of `numpy.quantile` with method "inverted_cdf" over all
        pairs in `paths` that have the score; None if no pair has it.
    """
    found = [rows[name].drop_null().to_numpy() for p in paths for rows in read_decisions(p, [name])]
    values = np.concatenate(found) if found else np.zeros(0, np.float32)
    values = values[~np.isnan(values)]
    return np.quantile(values, shares, method="inverted_cdf").tolist() if len(values) else None


def set_quantile_limit(config: ml_collections.ConfigDict) -> None:
    """Sets limits such as `clip.min_score` from the quantiles of their steps, in place.

    Raises:
        ValueError: a folder `scores` is unfinished, has no scores, or has those of another model.
    """
    for step in registry.ordered_steps():
        if not issubclass(step, ScoreStep) or config[step.name].quantile is None:
            continue
        c, key = config[step.name], f"config.{step.name}.scores"
        outputs, stats = find_outputs(c.scores, key)
        paths = list(map(decisions_path, outputs))
        try:
            share = 1 - c.quantile if step.drops_high else c.quantile
            found = score_quantiles(paths, step.score_name(), [share])
        except KeyError:
            found = None  # the step was not active
        if found is None:
            raise ValueError(
                f"{key}='{c.scores}': no pair has a score; filter into that folder with "
                f"config.{step.switch} first"
            )
        _check_model(step, config, stats["config"][step.name])
        c[step.limit_key] = found[0]


def _check_model(
    step: type[ScoreStep], config: ml_collections.ConfigDict, scored_by: Mapping[str, Any]
) -> None:
    """Raises if the scores come from another model, head or embeddings than the config names.

    Compares hashes of the files, or names if the files are missing or were not recorded.
    """
    c = config[step.name]
    now: Mapping[str, Any] = {}
    with contextlib.suppress(ValueError):
        now = step.describe_rules(config)
    for below in (("parts",), ()):
        before = files.read_object(files.join(c.scores, *below, SETTINGS)) or {}
        known = [name for name in now if name in before and not name.endswith("_rules")]
        other = [name.rpartition("_")[2] for name in known if before[name] != now[name]]
        if known:
            break
    else:
        names = (str(step.switch).rpartition(".")[2], "model", "embeddings")
        other = [name for name in names if scored_by.get(name) != c.get(name)]
    if other:
        raise ValueError(
            f"config.{step.name}.scores='{c.scores}' has scores of another {other[0]} than "
            f"config.{step.name} names; filter into a folder with these first, and name that folder"
        )


def record_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns the settings that determine the written records, as plain JSON-able values."""
    settings = config.to_dict()
    for name in _NOT_HASHED:
        del settings[name]
    for step in registry.ordered_steps():
        if step.section is not None:
            keys = settings.pop(step.section)
            for name in step.not_hashed:
                del keys[name]
            if step.is_active(config):
                settings[step.section] = keys
    return json.loads(json.dumps(settings))  # tuples become lists, as in settings read from a file


def describe_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """Returns all settings that are hashed: config, rules and the version of EasyOCR; JSON-able.

    EasyOCR is the only package whose version is hashed; see `package_versions` for the others.

    Raises:
        ValueError: text spotting is requested, and EasyOCR is not installed.
    """
    settings = record_settings(config)
    settings["format_version"] = _FORMAT_VERSION
    for step in registry.ordered_steps():
        if step.is_active(config):
            settings |= step.describe_rules(config)
    return settings


def package_versions(config: ml_collections.ConfigDict) -> dict[str, str]:
    """Returns the versions of the packages in use, for the statistics of every shard.

    Versions are recorded and not hashed. In an unfinished folder, another spaCy model is rejected
    like another config, because it produces other graphs (`DECIDING_PACKAGES`). Another version of
    spaCy, py3langid or Pillow rarely changes a decision: the job continues, and the report warns
    about shards that were made with different versions.

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
    """Yields the differences between two configs, such as "image.min_side 1 -> 2"."""
    if not before:
        return
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from compare_settings(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} {old} -> {new}"
