"""The full training config: keys of `diht_jax.config`, losses and terms; durations in steps."""

from __future__ import annotations

import itertools
import re
from typing import Any

import ml_collections

from diht_jax.config.checks import check_unset, validate_config
from diht_jax.config.keys import (
    COUNT,
    DURATION_UNITS,
    DURATIONS,
    FIXED,
    FREE,
    KEYS,
    NOT_NEGATIVE,
    Key,
    OneOf,
    build_config,
    check_ranges,
)
from diht_jax.input.transforms import Preprocessing
from diht_jax.losses.registry import LOSSES
from diht_jax.models.zoo import ARCHITECTURE_FIELDS
from diht_jax.training.monitoring.trackers import tracker_names
from diht_jax.training.optimizer import decay_start
from diht_jax.training.terms.registry import TERMS

# Maps a prefix of keys to the files whose comments describe the keys.
COMMENT_FILES = {
    "": "diht_jax/config/keys.py",
    "model.overrides.": "diht_jax/models/zoo.py",
    "loss.": "diht_jax/losses/*.py",
    "affinity.": "diht_jax/extras/affinity.py",
    "captioning.": "diht_jax/extras/captioning.py",
    "concepts.": "diht_jax/training/terms/concepts.py",
}


def all_keys() -> dict[str, Any]:
    """Returns every key of a recipe by dotted name: a `Key`, or a default without a range."""
    keys: dict[str, Any] = {**KEYS, "loss.kind": Key("softmax", OneOf(tuple(LOSSES)))}
    for field, kind in ARCHITECTURE_FIELDS.items():  # to replace
        may_be_0 = kind is float or field == "end_of_text_id"
        least = NOT_NEGATIVE if may_be_0 else COUNT if kind is int else None
        keys[f"model.overrides.{field}"] = Key(kind, least)
    # A loss ignores the keys of other losses.
    for section, owner in [*itertools.product(["loss"], LOSSES.values()), *TERMS.items()]:
        for name, value in owner.settings.items():
            key = f"{section}.{name}"
            assert keys.setdefault(key, value) == value, f"{key}: two different defaults"
    return keys


def default_config() -> ml_collections.ConfigDict:
    """Returns every key of a recipe with its default; None means "not set"."""
    return build_config(all_keys())


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks the name, type and range of every key of a recipe."""
    keys = all_keys()
    defaults = build_config(keys)
    validate_config(config, defaults)
    check_ranges(config, keys)
    check_unset(config, defaults)
    tracker_names(config.trackers)
    pictures_of(config)
    for name in ("caption_weights", "caption_columns"):
        if config.data[name] and config.data.captions == "first":
            raise ValueError(
                f"config.data.{name} needs config.data.captions='sample'; with 'first' it would "
                "do nothing"
            )
    if config.model.tokenizer is not None and config.captioning.weight:
        raise ValueError(
            "config.captioning.weight: captions are written with CLIP's tokenizer, and not with "
            f"config.model.tokenizer='{config.model.tokenizer}'"
        )


def pictures_of(config: ml_collections.ConfigDict) -> Preprocessing:
    """Returns the preprocessing of a run's pictures."""
    given: dict[str, Any] = {}
    for name, value in config.model.pictures.items():
        if value is not None:
            given[name] = tuple(value) if name in ("mean", "std") else value
    try:
        return Preprocessing(**given)
    except ValueError as error:
        raise ValueError(f"config.model.pictures.{error}") from error


def key_of(name: str) -> Key:
    """Returns the key that a dotted name denotes or is part of.

    Names in a user-defined section, such as "evaluation.tasks.pets.kind", belong to the key of that
    section. Settings of losses and terms cannot change within a run; neither can the sources of a
    mixture, except for their paths.
    """
    if name.startswith("data.train."):
        is_path = bool(re.fullmatch(r"data\.train\.[^.]+\.(path|labels)", name))
        return Key(None, resume=FREE if is_path else FIXED, per_host=is_path)
    while name and name not in KEYS:
        name = name.rpartition(".")[0]
    return KEYS[name] if name else Key(None, resume=FIXED)


def duration_in_steps(config: ml_collections.ConfigDict, prefix: str, *, num_examples: int) -> int:
    """Converts the duration `prefix` ("total"), given in any unit, to optimiser steps.

    Args:
        config: has `{prefix}_steps`, `{prefix}_examples` and `{prefix}_epochs`, one of them set.
        prefix: common prefix of the three names.
        num_examples: examples per epoch.
    """
    given = {}
    for unit, name in zip(DURATION_UNITS, DURATIONS[prefix], strict=True):
        if config.get(name) is not None:
            given[unit] = config[name]
    if len(given) != 1:
        names = ", ".join(f"config.{name}" for name in DURATIONS[prefix])
        raise ValueError(f"set exactly one of {names}; got {given or 'none of them'}")
    unit, value = next(iter(given.items()))
    batch_size = config.data.batch_size
    examples_per_unit = {"steps": batch_size, "examples": 1, "epochs": num_examples}[unit]
    steps = round(value * examples_per_unit / batch_size)
    if steps < 1:
        raise ValueError(
            f"config.{prefix}_{unit}={value} is {steps} steps at batch size {batch_size}; "
            "expected at least one step"
        )
    return steps


def patch_dropout_steps(
    config: ml_collections.ConfigDict, total_steps: int, *, num_examples: int
) -> int:
    """Returns the number of initial steps that may drop patches.

    Raises:
        ValueError: more than one of `no_patch_dropout_steps`, `no_patch_dropout_examples` and
            `no_patch_dropout_epochs` is set, patch dropout is off, or the duration would cover the
            whole run.
    """
    if set(map(config.get, DURATIONS["no_patch_dropout"])) == {None}:
        return total_steps
    if not config.model.patch_dropout:
        raise ValueError(
            "config.no_patch_dropout_* is how long a run with config.model.patch_dropout ends "
            f"without it, but config.model.patch_dropout={config.model.patch_dropout}; set a share "
            "of patches to drop, or leave config.no_patch_dropout_* at None"
        )
    last_steps = duration_in_steps(config, "no_patch_dropout", num_examples=num_examples)
    if last_steps >= total_steps:
        raise ValueError(
            f"config.no_patch_dropout_*: {last_steps} steps without patch dropout are not less "
            f"than the {total_steps} steps of the run; shorten them or set "
            "config.model.patch_dropout=0"
        )
    return total_steps - last_steps


def steps_before_end(config: ml_collections.ConfigDict, *, num_examples: int) -> int:
    """Returns the number of initial steps that do not depend on the length of the run."""
    total_steps = duration_in_steps(config, "total", num_examples=num_examples)
    return min(
        decay_start(config.optimizer, total_steps),
        patch_dropout_steps(config, total_steps, num_examples=num_examples),
    )
