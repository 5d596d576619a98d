"""Work directories of training: Orbax checkpoints without their files, configs that are invalid."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import logging
from hypothesis.strategies import booleans
from hypothesis.strategies import sampled_from as one

from diht_jax.loading import read_model
from diht_jax.training.workdir.saved_run import CHECKPOINT_DIRECTORY, CONFIG_FILE
from tests.fuzz.damage import Draw, changed_json, cut, damage_folder
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require
from tests.make import tiny_config, write_run

_STEPS = (3, 7)
_whole: dict[str, Any] = {}


def prepare(base: pathlib.Path) -> None:
    """A run of a very small model with two equal checkpoints, to be copied."""
    logging.set_verbosity(logging.FATAL)
    for step in _STEPS:
        write_run(base, tiny_config(), step=step)
    _whole.update(folder=base, params=read_model(base).params)


def _judge(folder: pathlib.Path, must_fail: bool = False) -> str:
    """The parameters that were saved, or an error that names the directory."""
    model = attempt(lambda: read_model(folder), folder, "config key", "config.model")
    if isinstance(model, Refused):
        return ERROR
    require(not must_fail, "a model was read where there is nothing to read")
    require(model.step in _STEPS, f"step {model.step}")
    same = jax.tree.map(np.array_equal, _whole["params"], model.params)
    require(all(jax.tree.leaves(same)), f"parameters have changed: {same}")
    return SUCCESS


def _copy(folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(_whole["folder"], folder / "run"))


def check_damaged_files(draw: Draw, folder: pathlib.Path) -> str:
    """Files of the config or of the only checkpoint that are damaged, swapped or gone."""
    run = _copy(folder)
    shutil.rmtree(run / CHECKPOINT_DIRECTORY / str(_STEPS[0]))
    damage_folder(draw, run if draw(booleans()) else run / CHECKPOINT_DIRECTORY)
    return _judge(run)


def check_all_files_gone_or_cut(draw: Draw, folder: pathlib.Path) -> str:
    """A latest checkpoint as on a full disk is an error, whatever earlier one there is."""
    run = _copy(folder)
    is_cut = draw(booleans())
    for path in (run / CHECKPOINT_DIRECTORY / str(_STEPS[-1])).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            path.write_bytes(draw(cut(data)) if data else b"") if is_cut else path.unlink()
    return _judge(run, must_fail=True)


def check_config(draw: Draw, folder: pathlib.Path) -> str:
    """A config that is damaged, of another model, or of no model."""
    path = _copy(folder) / CONFIG_FILE
    config = json.loads(path.read_bytes())
    section = draw(one(["model", "data", "ema", "loss"]))
    if draw(booleans()):
        config[section] = draw(changed_json(config[section]))
    else:
        config["model"]["overrides"] = draw(changed_json(config["model"]["overrides"]))
    path.write_text(json.dumps(config), encoding="utf-8", errors="surrogatepass")
    return _judge(path.parent)
