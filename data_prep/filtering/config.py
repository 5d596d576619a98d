"""The config of the filter: keys, checks, limits, and the hash of all that decides what is written.

The keys of the steps stand in the steps' own files.
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

# Raised whenever the same config comes to mean other records.
_FORMAT_VERSION = 4
# Recorded versions that must not change while a folder is filled, see `package_versions`.
DECIDING_PACKAGES = ("spacy_model",)
# Keys, and sections, that decide where, how fast and in which portions, but not what is written of
# a pair: those of all jobs, and these.
_NOT_HASHED = {
    *(name.partition(".")[0] for name in failures.KEYS),
    *("input", "output", "input_identity", "keep_before_damage", "batch_size"),
    *("examples_per_shard", "output_format", "keep_parts", "clean_label"),
}
SETTINGS = "settings.json"  # in the folder of the parts: what the config means

# Prefix of keys -> files whose comments describe them.
COMMENT_FILES = {
    "": "data_prep/filtering/config.py data_prep/steps/*.py data_prep/jobs/failures.py",
    "aesthetic.": "data_prep/steps/scores.py",
    "unsafe.": "data_prep/steps/scores.py",
    "spotter.": "data_prep/text_spotting/*.py",
    "source.": "diht_jax/readers/*.py",
}


KEYS: dict[str, Any] = failures.KEYS | {
    # Any source of docs/guides/prepare/sources.md; several are separated by commas.
    "input": str,
    "output": str,  # folder of the shards
    "caption_kind": USUAL_KIND,  # of the captions of the input, where they state none
    # More captions in columns of the metadata, by kind, such as "synthetic=re_caption".
    "caption_columns": "",
    # What counts as the same input, or "hash", "size"; docs/guides/prepare/shards.md.
    "input_identity": Key("time", OneOf(shards.IDENTITIES)),
    "dataset_name": "pairs",  # with the split it makes the names of the shards
    "split": "train",  # the second part of these names
    "concepts": True,  # count and keep objects and attributes of the captions, for data_prep.label
    "metadata_only": False,  # rows of parquet or jsonl in and out, C and A only, no images
    "drop_metadata": ("exif",),  # fields that are not worth their bytes
    "output_format": "tfrecord",  # or "array_record", "webdataset": of the output shards
    # Records of an output shard, about; None: each input shard makes one.
    "examples_per_shard": Key(int, COUNT),
    "keep_parts": False,  # keep what was filtered of every input shard, once it was re-sharded
    "samples_per_outcome": Key(50, NOT_NEGATIVE),  # examples in the statistics, to look at
    "report_samples": Key(8, NOT_NEGATIVE),  # examples of each outcome in the report, with pictures
    "label_field": str,  # field of the metadata by whose values pairs are counted
    "clean_label": "clean",  # the value of good pairs; all others are noise that should go
    "seed": 0,  # of the choice of examples
    "keep_before_damage": False,  # of a tar that is cut off or damaged, keep the pairs before that
    # Pairs that are read and parsed together; what C and A leave of them fills a spotter's window.
    "batch_size": Key(1024, COUNT),
}

OPTIONAL_KEYS = ("examples_per_shard",)  # they may be None, which is not their default


def all_keys() -> dict[str, Any]:
    """The keys of the filter and of its steps: dotted name -> a `Key`, or a default."""
    keys = dict(KEYS)
    for step in registry.ordered_steps():
        keys |= step.keys
    return keys


def default_config() -> ml_collections.ConfigDict:
    """Every key of a filter config, with its default."""
    c = build_config(all_keys())
    c.examples_per_shard = 10_000
    c.source = default_source()
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

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
    """The least scores that are as high as a share of all; held are 4 bytes for each pair.

    Returns:
        For each share (0 to 1) the value of `numpy.quantile` with method "inverted_cdf", of the
        pairs in these files of decisions that have the score; None where none has.
    """
    found = [rows[name].drop_null().to_numpy() for p in paths for rows in read_decisions(p, [name])]
    values = np.concatenate(found) if found else np.zeros(0, np.float32)
    values = values[~np.isnan(values)]
    return np.quantile(values, shares, method="inverted_cdf").tolist() if len(values) else None


def set_quantile_limit(config: ml_collections.ConfigDict) -> None:
    """Makes limits of the quantiles of steps, in place, such as `clip.min_score`.

    Raises:
        ValueError: a folder `scores` is not finished, or has no scores, or those of another model.
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
    """Refuses the scores of another model, head or embeddings than the config names.

    They are known by their files; where these are not here, or were not recorded, by their names.
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
    """The part of the config that decides what is written, as plain JSON-able values."""
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
    return json.loads(json.dumps(settings))  # lists for tuples, as they are read again


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
