"""Configs of training: recipes, keys with their ranges, and validation.

Recipes in `configs/` start from `default_config()`; `diht_jax.train` calls
`diht_jax.training.recipe.check_config` before it does anything else. Every key is written once, in
`keys.py`, and those of losses and of terms of the objective in their own files.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import ml_collections

from diht_jax.config.architecture import ARCHITECTURE_FIELDS, parse_fields
from diht_jax.config.checks import PathsOrSections, TextOrSections, nearest_name, validate_config

__all__ = [
    "ARCHITECTURE_FIELDS",
    "PathsOrSections",
    "TextOrSections",
    "default_config",
    "find_recipes",
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


def find_recipes(path: str | pathlib.Path) -> None:
    """Lets a recipe import those of its own folder, and of `configs/`, in any working directory.

    Args:
        path: of the recipe; `from configs import common` looks in the folder above its own, and
            next to this package.

    Raises:
        ValueError: no such file.
    """
    path = pathlib.Path(path)
    if not path.is_file() or path.suffix != ".py":
        raise ValueError(f"{path}: no such config file; expected a path such as configs/emoji.py")
    checkout = pathlib.Path(__file__).resolve().parents[2]
    for folder in map(str, (path.resolve().parents[1], checkout)):
        if folder not in sys.path:
            sys.path.append(folder)


def load_recipe(path: str | pathlib.Path, arg: str = "") -> ml_collections.ConfigDict:
    """The config that a recipe file's `get_config(arg)` returns.

    Args:
        path: a Python file such as `configs/emoji.py`.
        arg: what follows the colon on a command line, such as "debug=True".

    Raises:
        ValueError: no such file, or it gives no config.
    """
    find_recipes(path)
    path = pathlib.Path(path)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ValueError(f"{path}: a config file must define get_config(); it does not")
    config = get_config(arg) if arg else get_config()
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"{path}: get_config() must return an ml_collections.ConfigDict, such as that of "
            f"diht_jax.config.default_config(); got {type(config).__name__}"
        )
    return config
