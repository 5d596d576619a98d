"""The full training config: the keys of `diht_jax.config`, of all losses and of all terms."""

from __future__ import annotations

from typing import Any

import ml_collections

from diht_jax.config.checks import validate_config
from diht_jax.config.keys import FIXED, KEYS, Key, build_config, check_ranges
from diht_jax.losses.registry import default_settings
from diht_jax.training.terms.registry import TERMS


def all_keys() -> dict[str, Any]:
    """Every key of a recipe by its dotted name: a `Key`, or a default without a range."""
    return {
        **KEYS,
        **{f"loss.{name}": value for name, value in default_settings().items()},
        **{
            f"{section}.{name}": value
            for section, term in TERMS.items()
            for name, value in term.settings.items()
        },
    }


def default_config() -> ml_collections.ConfigDict:
    """Every key of a training recipe, with its default; None means "not set"."""
    return build_config(all_keys())


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks name, type and range of every key of a recipe.

    Raises:
        ValueError: names the first wrong key.
    """
    keys = all_keys()
    validate_config(config, build_config(keys))
    check_ranges(config, keys)


def key_of(name: str) -> Key:
    """The key that a dotted name belongs to, or is a part of.

    Names inside a section of the user's own, such as "evaluation.tasks.pets.kind", belong to the
    key of that section. Settings of losses and terms are fixed in a run.
    """
    while name and name not in KEYS:
        name = name.rpartition(".")[0]
    return KEYS[name] if name else Key(None, resume=FIXED)
