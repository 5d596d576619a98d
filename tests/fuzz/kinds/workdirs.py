"""Work directories of training: Orbax checkpoints without their files, configs that are invalid."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from hypothesis.strategies import booleans, integers
from hypothesis.strategies import sampled_from as one

from diht_jax.config import default_config
from diht_jax.loading import read_model
from diht_jax.models.parameters import model_definition
from diht_jax.models.zoo import get_architecture
from diht_jax.training.workdir.saved_run import (
    CHECKPOINT_DIRECTORY,
    CHECKS_ITEM,
    CONFIG_FILE,
    STATE_ITEM,
    tree_checksums,
    write_config,
)
from tests.fuzz.damage import Draw, changed_json, cut, damage_folder
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require
from tests.fuzz.kinds.weights import FIELDS

_STEPS = (3, 7)
_whole: dict[str, Any] = {}


def prepare(base: pathlib.Path) -> None:
    """A run of a very small model with two checkpoints, to be copied."""
    logging.set_verbosity(logging.FATAL)
    config = default_config()
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.update(FIELDS)
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    _, init_params = model_definition(arch, "float32", "float32")
    write_config(base, config)
    params = jax.jit(init_params)(jax.random.key(0))
    with (
        ocp.StandardCheckpointer() as states,
        ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checks,
    ):
        for step in _STEPS:
            directory = base / CHECKPOINT_DIRECTORY / str(step)
            state = {"params": jax.tree.map(lambda x, step=step: x + step, params)}
            states.save(directory / STATE_ITEM, state)
            sums = {"state": tree_checksums(state)}
            checks.save(directory / CHECKS_ITEM, args=ocp.args.JsonSave(sums))
    _whole.update(folder=base, params=jax.tree.map(np.asarray, params))
    require(_judge(base) == SUCCESS, "the undamaged run")


def _judge(folder: pathlib.Path, must_fail: bool = False, **options: Any) -> str:
    """The parameters that were saved at the step, or an error that names the directory."""
    model = attempt(lambda: read_model(folder, **options), folder, "config key", "config.model")
    if isinstance(model, Refused):
        return ERROR
    require(not must_fail, "a model was read where there is nothing to read")
    require(model.step in _STEPS, f"step {model.step}")
    same = jax.tree.map(
        lambda saved, found: np.array_equal(saved + np.float32(model.step), found),
        _whole["params"],
        model.params,
    )
    require(all(jax.tree.leaves(same)), f"parameters have changed: {same}")
    return SUCCESS


def _copy(folder: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(_whole["folder"], folder / "run"))


def check_damaged_files(draw: Draw, folder: pathlib.Path) -> str:
    """Files of the config or of the latest checkpoint that are damaged, swapped or gone."""
    run = _copy(folder)
    shutil.rmtree(run / CHECKPOINT_DIRECTORY / str(_STEPS[0]))
    damage_folder(draw, run if draw(booleans()) else run / CHECKPOINT_DIRECTORY)
    return _judge(run)


def check_all_files_gone_or_cut(draw: Draw, folder: pathlib.Path) -> str:
    """As on a full disk: that must be an error, whatever earlier checkpoint there is."""
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


def check_directories(draw: Draw, folder: pathlib.Path) -> str:
    """Unfinished checkpoints and other things beside the good ones, steps that are not there."""
    step = draw(one([None, *_STEPS, 0, -1, 4, 10**12]))
    if step is not None:
        outcome = _judge(_whole["folder"], must_fail=step not in _STEPS, step=step)
        require((outcome == SUCCESS) == (step in _STEPS), f"step {step}: {outcome}")
        return outcome
    root = _copy(folder) / CHECKPOINT_DIRECTORY
    names = ["9.orbax-checkpoint-tmp-123", "latest", "-1", "1e3", "notes.txt", "٣", ".hidden"]
    name = draw(one(names))
    (root / name).mkdir()
    if draw(booleans()):
        shutil.copytree(root / str(_STEPS[0]), root / name, dirs_exist_ok=True)
    require(_judge(root.parent) == SUCCESS, f"the good checkpoints are hidden by '{name}'")
    return SUCCESS


def check_no_run(draw: Draw, folder: pathlib.Path) -> str:
    """Empty directories, files, and runs that never saved."""
    run = _copy(folder)
    form = draw(integers(0, 3))
    if form == 0:
        (run / CONFIG_FILE).unlink()
    else:
        shutil.rmtree(run / CHECKPOINT_DIRECTORY if form < 3 else run)
        (run / CHECKPOINT_DIRECTORY if form == 1 else run).mkdir(exist_ok=True)
    return _judge(run, must_fail=True)
