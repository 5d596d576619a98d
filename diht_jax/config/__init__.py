"""Recipes of training runs: finding, listing, loading, and overriding them on the command line.

Recipes in `configs/` start from `default_config()`. `diht_jax.train` first calls
`diht_jax.training.recipe.check_config`. All keys are defined in `keys.py`, except those of losses
and of terms of the objective, which have their own files.

A recipe's name is its path in `configs/` without `.py`, such as `demo` or `prep/cat`; the last part
is enough. On a command line, `None` unsets a key, and a duration replaces the recipe's duration.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from collections.abc import Collection

import ml_collections
from absl import logging

from diht_jax.config.checks import nearest_name
from diht_jax.config.checks import validate_config as validate_config
from diht_jax.config.keys import DURATIONS

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "recipes" / "configs"  # location in a wheel, set in pyproject.toml
# `configs/` of a checkout, or its copy in an installed package.
RECIPE_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def default_config() -> ml_collections.ConfigDict:
    """Returns a training config with every key and its default; None means "not set"."""
    # Imported here, since losses and terms define further keys and import JAX, which validating a
    # config does not need. No module of a lower layer imports this one.
    from diht_jax.training.recipe import default_config

    return default_config()


def list_recipes() -> dict[str, pathlib.Path]:
    """Returns name -> file of all recipes, training recipes first."""
    files = [*sorted(RECIPE_FOLDER.glob("*.py")), *sorted(RECIPE_FOLDER.glob("*/*.py"))]
    return {
        path.relative_to(RECIPE_FOLDER).with_suffix("").as_posix(): path
        for path in files
        if "def get_config(" in path.read_text("utf-8")
    }


def find_recipe(name: str | pathlib.Path) -> pathlib.Path:
    """Returns the file of a recipe, and extends `sys.path` for the recipe's imports.

    Args:
        name: such as `demo` or `prep/cat`; a name that ends with `.py` is a path. For
            `from configs import common`, Python then searches the folder above the recipe's own,
            and then `configs/` itself, in any working directory.
    """
    name = str(name)
    path = pathlib.Path(name)
    if path.suffix != ".py":
        recipes = list_recipes()
        found = [recipes[known] for known in recipes if name in (known, known.rpartition("/")[2])]
        if len(found) != 1:
            raise ValueError(f"{name[:200]}: no recipe has this name{_suggest(name)}")
        path = found[0]
    elif not path.is_file():
        raise ValueError(f"{path}: no such config file{_suggest(path.stem)}")
    for folder in map(str, (path.resolve().parents[1], RECIPE_FOLDER.parent)):
        if folder not in sys.path:
            sys.path.append(folder)
    return path


def load_recipe(name: str | pathlib.Path, arg: str = "") -> ml_collections.ConfigDict:
    """Returns the config that a recipe's `get_config(arg)` returns.

    Args:
        name: such as `demo`, or the path of a Python file. As on a command line, the argument may
            follow a colon, `demo:debug=True`.
        arg: the argument, such as "debug=True".

    Raises:
        ValueError: there is no such recipe, or it returns no config.
    """
    name, _, own = str(name).partition(":")
    arg, path = arg or own, find_recipe(name)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # true for every name that ends with .py
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


def apply_overrides(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """Unsets the durations that a duration on the command line replaces; in place.

    A recipe's warm-up that is too long for the new number of steps becomes a tenth of them.
    """
    for names in map(set, DURATIONS.values()):
        if set(map(config.get, names.intersection(given))) - {None}:
            for name in names.difference(given):
                config[name] = None
    steps = config.total_steps if "total_steps" in given else None
    if steps and "optimizer.warmup_steps" not in given and config.optimizer.warmup_steps >= steps:
        before, config.optimizer.warmup_steps = config.optimizer.warmup_steps, steps // 10
        logging.warning(
            "--config.total_steps=%d is shorter than the recipe's warm-up of %d steps; taking %d "
            "(--config.optimizer.warmup_steps)",
            steps,
            before,
            steps // 10,
        )


def _suggest(name: str) -> str:
    """Returns the end of a message, with the recipes of a similar name and all others."""
    recipes = list_recipes()
    # Compares the last parts, so that "cta" is similar to "prep/cat".
    parts = {known.rpartition("/")[2]: known for known in recipes}
    nearest = nearest_name(name[:200].rpartition("/")[2], parts)
    hint = f"; did you mean '{parts[nearest]}'? " if nearest else ". "
    return f"{hint}Recipes: {', '.join(recipes)}; or give a path that ends with .py"
