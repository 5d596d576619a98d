"""What the tests of filter jobs share: configs, and the bytes of an output."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import ml_collections

from data_prep import cat_config
from diht_jax.config import load_recipe, validate_config

_RECIPES = pathlib.Path(__file__).resolve().parents[2] / "configs" / "prep"
# Where the input lay, and what tells how long it took.
_NOT_COMPARED = re.compile(r"^report\.|\.(seconds|place)\.json$")


def job_config(
    source: str, output: pathlib.Path, recipe: str = "convert", **changes: Any
) -> ml_collections.ConfigDict:
    """A recipe of configs/prep in this process; `section__key=value` changes it."""
    config = load_recipe(_RECIPES / f"{recipe}.py")
    # Text-spotting has tests of its own.
    config.update({"num_workers": 0, "text_spotting": False})
    config.update({"input": source, "output": str(output)})
    for name, value in changes.items():
        section, _, key = name.rpartition("__")
        (config[section] if section else config)[key] = value
    validate_config(config, cat_config.default_config())
    cat_config.check_config(config)
    return config


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    """All files but those that tell how long it took, and where the input lay."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not _NOT_COMPARED.search(path.name)
    }
