"""Work directories of training: Orbax checkpoints without their files, configs that are none."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from diht_jax.config import default_config
from diht_jax.loading import read_model
from diht_jax.models.parameters import model_definition
from diht_jax.models.zoo import get_architecture
from diht_jax.training.workdir.checkpoint import CHECKPOINT_DIRECTORY, CHECKS_ITEM, STATE_ITEM
from diht_jax.training.workdir.checksums import tree_checksums
from diht_jax.training.workdir.config_file import CONFIG_FILE, write_config
from tests.fuzz.cases import DEEP_JSON, ERROR, NOT_UTF8, SUCCESS, Draw, Refused, attempt, require

_FIELDS = {
    "image_size": 8,
    "patch_size": 4,
    "vision_layers": 1,
    "vision_width": 8,
    "vision_heads": 1,
    "text_layers": 1,
    "text_width": 8,
    "text_heads": 1,
    "embed_dim": 4,
    "context_length": 5,
    "vocab_size": 12,
}
_STEPS = (3, 7)
_whole: dict[str, Any] = {}


def prepare(base: pathlib.Path) -> None:
    """A run of a very small model with two checkpoints, to be copied."""
    logging.set_verbosity(logging.FATAL)
    config = default_config()
    config.model.name = "tiny_32px"
    config.model.dtype = "float32"
    config.model.overrides.update(_FIELDS)
    arch = get_architecture(config.model.name, config.model.overrides.to_dict())
    _, init_params = model_definition(arch, "float32", "float32")
    folder = base / "whole"
    folder.mkdir()
    write_config(folder, config)
    params = jax.jit(init_params)(jax.random.key(0))
    with (
        ocp.StandardCheckpointer() as states,
        ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checks,
    ):
        for step in _STEPS:
            place = folder / CHECKPOINT_DIRECTORY / str(step)
            state = {"params": jax.tree.map(lambda x, step=step: x + step, params)}
            states.save(place / STATE_ITEM, state)
            sums = {"state": tree_checksums(state)}
            checks.save(place / CHECKS_ITEM, args=ocp.args.JsonSave(sums))
    _whole.update(folder=folder, params=jax.tree.map(np.asarray, params))
    require(judge(folder) == SUCCESS, "the undamaged run")


def judge(folder: pathlib.Path, must_fail: bool = False, **options: Any) -> str:
    """The parameters that were saved at the step, or an error that names the directory."""
    model = attempt(lambda: read_model(folder, **options), folder, "config key", "config.model")
    if isinstance(model, Refused):
        return ERROR
    require(not must_fail, "a model was read where there is none")
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


def _files(run: pathlib.Path) -> list[pathlib.Path]:
    """Of the latest checkpoint."""
    root = run / CHECKPOINT_DIRECTORY / str(_STEPS[-1])
    return sorted(path for path in root.rglob("*") if path.is_file())


def _missing_files(draw: Draw, folder: pathlib.Path) -> str:
    run = _copy(folder)
    files = _files(run)
    form = draw.randrange(3)
    if form == 0:
        draw.choice(files).unlink()
        return judge(run)
    for path in files:
        path.unlink()
    if form == 2:
        shutil.rmtree(run / CHECKPOINT_DIRECTORY / str(_STEPS[-1]))
        return judge(run)
    return judge(run, must_fail=True)


def _damaged_files(draw: Draw, folder: pathlib.Path) -> str:
    run = _copy(folder)
    path = draw.choice(_files(run))
    path.write_bytes(draw.damage(path.read_bytes()))
    return judge(run)


def _cut_files(draw: Draw, folder: pathlib.Path) -> str:
    """Every file of the checkpoint ends early, as on a full disk."""
    run = _copy(folder)
    for path in _files(run):
        path.write_bytes(draw.cut(path.read_bytes()) if path.stat().st_size else b"")
    return judge(run, must_fail=True)


def _other_directories(draw: Draw, folder: pathlib.Path) -> str:
    """Unfinished checkpoints and other things beside the good ones."""
    run = _copy(folder)
    root = run / CHECKPOINT_DIRECTORY
    name = draw.choice(
        ["9.orbax-checkpoint-tmp-123", "latest", "-1", "1e3", "notes.txt", "٣", ".hidden"]
    )
    (root / name).mkdir()
    if draw.random() < 0.5:
        shutil.copytree(root / str(_STEPS[0]), root / name, dirs_exist_ok=True)
    outcome = judge(run)
    require(outcome == SUCCESS, f"the good checkpoints are hidden by '{name}'")
    return outcome


def _wrong_step(draw: Draw, folder: pathlib.Path) -> str:
    run = _copy(folder)
    step = draw.choice([*_STEPS, 0, -1, 4, 10**12])
    outcome = judge(run, must_fail=step not in _STEPS, step=step)
    require((outcome == SUCCESS) == (step in _STEPS), f"step {step}: {outcome}")
    return outcome


def _damaged_config(draw: Draw, folder: pathlib.Path) -> str:
    run = _copy(folder)
    path = run / CONFIG_FILE
    contents = path.read_bytes()
    path.write_bytes(
        draw.choice([draw.damage(contents), DEEP_JSON, b"[]", b"3", b"null", b"", *NOT_UTF8])
    )
    return judge(run)


def _odd_config(draw: Draw, folder: pathlib.Path) -> str:
    """Another model, or no model at all."""
    run = _copy(folder)
    path = run / CONFIG_FILE
    config = json.loads(path.read_text())
    form = draw.randrange(4)
    if form == 0:
        field = draw.choice(sorted(_FIELDS))
        odd = [0, -1, 10**9, "8", None, 0.5, [8], True, 3]
        config["model"]["overrides"][field] = draw.choice(odd)
    elif form == 1:
        odd = [None, 3, "no such model", "", [], "tiny_32px\0"]
        config["model"]["name"] = draw.choice(odd)
    elif form == 2:
        odd = ["float99", "int8", 3, None, "bfloat16"]
        config["model"][draw.choice(["dtype", "param_dtype"])] = draw.choice(odd)
    else:
        section = draw.choice(["model", "data", "ema", "loss"])
        config[section] = draw.choice([3, None, [], "text", {"unknown": 1}, {"a.b": 1}])
    path.write_text(json.dumps(config))
    return judge(run)


def _no_run(draw: Draw, folder: pathlib.Path) -> str:
    """Empty directories, files, and runs that never saved."""
    run = _copy(folder)
    form = draw.randrange(4)
    if form == 0:
        shutil.rmtree(run / CHECKPOINT_DIRECTORY)
    elif form == 1:
        (run / CONFIG_FILE).unlink()
    elif form == 2:
        shutil.rmtree(run / CHECKPOINT_DIRECTORY)
        (run / CHECKPOINT_DIRECTORY).mkdir()
    else:
        run = folder / "empty"
        run.mkdir()
    return judge(run, must_fail=True)


MUTATIONS = {
    "missing files": _missing_files,
    "damaged files": _damaged_files,
    "cut files": _cut_files,
    "other directories": _other_directories,
    "wrong step": _wrong_step,
    "damaged config": _damaged_config,
    "odd config": _odd_config,
    "no run": _no_run,
}
