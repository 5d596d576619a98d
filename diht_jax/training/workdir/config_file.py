"""The config of a run in its work directory, `config.json`."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

import jax
import ml_collections
from etils import epath

from diht_jax.storage.files import write_bytes
from diht_jax.training.recipe import default_config

CONFIG_FILE = "config.json"


def write_config(workdir: str | epath.Path, config: ml_collections.ConfigDict) -> None:
    """Writes the config into the work directory, as JSON."""
    if jax.process_index() != 0:
        return
    path = epath.Path(workdir) / CONFIG_FILE
    text = config.to_json_best_effort(indent=2) + "\n"
    if "://" in os.fspath(path):
        path.write_text(text)
    else:
        # A kill in the middle of it must not leave a run that cannot be resumed.
        write_bytes(pathlib.Path(path), text.encode())


def read_config(workdir: str | epath.Path) -> ml_collections.ConfigDict:
    """The config that `write_config` left, with the defaults of the keys that it lacks.

    Raises:
        ValueError: the file is missing or is no JSON.
    """
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        raise ValueError(f"{path} is missing: {workdir} is no work directory of diht_jax.train")
    try:
        written = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {error!s:.200}") from error
    if not isinstance(written, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(written).__name__}")
    defaults = json.loads(default_config().to_json_best_effort())
    try:
        return ml_collections.ConfigDict(_completed(written, defaults))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: names that no config can have ({error!s:.200})") from error


def _completed(written: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    filled = {**defaults, **written}
    for key, value in filled.items():
        if isinstance(value, dict) and isinstance(defaults.get(key), dict):
            filled[key] = _completed(value, defaults[key])
    return filled
