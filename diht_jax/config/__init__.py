"""Recipes of training: found by name or path, listed, loaded, and changed by a command line.

Recipes in `configs/` start from `default_config()`; `diht_jax.train` calls
`diht_jax.training.recipe.check_config` before it does anything else. Every key is written once, in
`keys.py`, and those of losses and of terms of the objective in their own files.

A name is a path in `configs/` without `.py`, such as `demo` or `prep/cat`; its last part is enough.
On a command line `None` unsets a key, and a duration replaces the one that the recipe has.
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
_INSTALLED = _PACKAGE / "recipes" / "configs"  # where a wheel has them; pyproject.toml says so
# `configs/` of a checkout, or the copy in an installed package.
RECIPE_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def default_config() -> ml_collections.ConfigDict:
    """Every key of a training recipe, with its default; None means "not set"."""
    # The door for recipes to a floor above: losses and terms bring keys of their own, and import
    # JAX, which is not needed to validate a config. No file of a lower floor imports this one.
    from diht_jax.training.recipe import default_config

    return default_config()


def list_recipes() -> dict[str, pathlib.Path]:
    """The files of all recipes by their names, those of training first."""
    files = [*sorted(RECIPE_FOLDER.glob("*.py")), *sorted(RECIPE_FOLDER.glob("*/*.py"))]
    return {
        path.relative_to(RECIPE_FOLDER).with_suffix("").as_posix(): path
        for path in files
        if "def get_config(" in path.read_text("utf-8")
    }


def find_recipe(name: str | pathlib.Path) -> pathlib.Path:
    """The file of a recipe, which may import those of its own folder and of `configs/` from now on.

    Args:
        name: such as `demo` or `prep/cat`; what ends with `.py` is a path. For
            `from configs import common` the folder above the recipe's own is searched, and then
            `configs/` itself, in any working directory.
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
    """The config that a recipe's `get_config(arg)` returns.

    Args:
        name: such as `demo`, or the path of a Python file; as on a command line, the argument may
            follow a colon, `demo:debug=True`.
        arg: the argument, such as "debug=True".

    Raises:
        ValueError: no such recipe, or it gives no config.
    """
    name, _, own = str(name).partition(":")
    arg, path = arg or own, find_recipe(name)
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # as for every name that ends with .py
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
    """Unsets those durations that a duration of the command line replaces; in place.

    A recipe's warm-up that does not fit into fewer steps becomes a tenth of them.
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
    """The recipes whose names are like this one, and all others, as the end of a sentence."""
    recipes = list_recipes()
    # The last parts are compared: "cta" is like "prep/cat".
    parts = {known.rpartition("/")[2]: known for known in recipes}
    nearest = nearest_name(name[:200].rpartition("/")[2], parts)
    hint = f"; did you mean '{parts[nearest]}'? " if nearest else ". "
    return f"{hint}Recipes: {', '.join(recipes)}; or give a path that ends with .py"
