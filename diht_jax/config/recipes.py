"""Recipes by name or path: found, listed and loaded.

A name is a path in `configs/` without `.py`, such as `demo` or `prep/cat`; its last part is enough.
"""

from __future__ import annotations

import difflib
import importlib.util
import pathlib
import sys

import ml_collections

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "recipes" / "configs"  # where a wheel has them; pyproject.toml says so


def recipe_folder() -> pathlib.Path:
    """The folder of the recipes: `configs/` of a checkout, or the copy in an installed package."""
    return _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"


def list_recipes() -> dict[str, pathlib.Path]:
    """The files of all recipes by their names, those of training first."""
    folder = recipe_folder()
    files = [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
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
    path = pathlib.Path(name)
    if path.suffix != ".py":
        path = _find_name(str(name))
    elif not path.is_file():
        raise ValueError(f"{path}: no such config file{_suggest(path.stem)}")
    for folder in map(str, (path.resolve().parents[1], recipe_folder().parent)):
        if folder not in sys.path:
            sys.path.append(folder)
    return path


def load_recipe(name: str | pathlib.Path, arg: str = "") -> ml_collections.ConfigDict:
    """The config that a recipe's `get_config(arg)` returns.

    Args:
        name: such as `demo`, or the path of a Python file.
        arg: what follows the colon on a command line, such as "debug=True".

    Raises:
        ValueError: no such recipe, or it gives no config.
    """
    path = find_recipe(name)
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


def _find_name(name: str) -> pathlib.Path:
    recipes = list_recipes()
    found = [path for known, path in recipes.items() if name in (known, known.rpartition("/")[2])]
    if len(found) != 1:
        raise ValueError(f"{name[:200]}: no recipe has this name{_suggest(name)}")
    return found[0]


def _suggest(name: str) -> str:
    """The recipes whose names are like this one, and all others, as the end of a sentence."""
    names = list(list_recipes())
    # The last parts are compared as well: "cta" is like "prep/cat".
    parts = {part: known for known in names for part in (known, known.rpartition("/")[2])}
    nearest = difflib.get_close_matches(name[:200], parts, n=3)
    hint = " or ".join(dict.fromkeys(f"'{parts[part]}'" for part in nearest))
    return (
        f"; did you mean {hint}? " if hint else ". "
    ) + f"Recipes: {', '.join(names)}; or give a path that ends with .py"
