"""Configs of training: recipes, keys with their ranges, and validation.

Recipes in `configs/` start from `default_config()`; `diht_jax.train` calls
`diht_jax.training.recipe.check_config` before it does anything else. Every key is written once, in
`keys.py`, and those of losses and of terms of the objective in their own files.
"""

from __future__ import annotations

import ml_collections

from diht_jax.config.architecture import ARCHITECTURE_FIELDS, parse_fields
from diht_jax.config.checks import PathsOrSections, TextOrSections, nearest_name, validate_config
from diht_jax.config.recipes import find_recipe, list_recipes, load_recipe

__all__ = [
    "ARCHITECTURE_FIELDS",
    "PathsOrSections",
    "TextOrSections",
    "default_config",
    "find_recipe",
    "list_recipes",
    "load_recipe",
    "nearest_name",
    "parse_fields",
    "validate_config",
]


def default_config() -> ml_collections.ConfigDict:
    """Every key of a training recipe, with its default; None means "not set"."""
    # The door for recipes to a floor above: losses and terms bring keys of their own, and import
    # JAX, which is not needed to validate a config. No file of a lower floor imports this one.
    from diht_jax.training.recipe import default_config

    return default_config()
