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
from hypothesis.strategies import booleans, integers
from hypothesis.strategies import sampled_from as one

from diht_jax.config import default_config
from diht_jax.loading import read_model
from diht_jax.models.parameters import model_definition
from diht_jax.models.zoo import get_architecture
from diht_jax.training.workdir.checkpoint import CHECKPOINT_DIRECTORY, CHECKS_ITEM, STATE_ITEM
from diht_jax.training.workdir.checksums import tree_checksums
from diht_jax.training.workdir.config_file import CONFIG_FILE, write_config
from tests.fuzz.damage import NO_OBJECT, Draw, cut, damaged
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require
from tests.fuzz.kinds.small_clip import FIELDS

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
    require(not must_fail, "a model was read where there is none")
    require(model.step in _STEPS, f"step {model.step}")
    same = jax.tree.map(
        lambda saved, found: np.array_equal(saved + np.float32(model.step), found),
        _whole["params"],
        model.params,
    )
    require(all(jax.tree.leaves(same)), f"parameters have changed: {same}")
    return SUCCESS


def _copy(folder: pathlib.Path) -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The run, and the files of its latest checkpoint."""
    run = pathlib.Path(shutil.copytree(_whole["folder"], folder / "run"))
    root = run / CHECKPOINT_DIRECTORY / str(_STEPS[-1])
    return run, sorted(path for path in root.rglob("*") if path.is_file())


def check_files(draw: Draw, folder: pathlib.Path) -> str:
    """A file that is missing or damaged; all of them gone, or cut off as on a full disk."""
    run, files = _copy(folder)
    form = draw(integers(0, 3))
    path = draw(one(files))
    if form == 0:
        path.unlink()
    elif form == 1:
        path.write_bytes(draw(damaged(path.read_bytes())))
    elif form == 2:
        for path in files:
            path.unlink()
    else:
        for path in files:
            path.write_bytes(draw(cut(path.read_bytes())) if path.stat().st_size else b"")
    return _judge(run, must_fail=form >= 2)


def check_other_directories(draw: Draw, folder: pathlib.Path) -> str:
    """Unfinished checkpoints and other things beside the good ones."""
    run, _ = _copy(folder)
    root = run / CHECKPOINT_DIRECTORY
    names = ["9.orbax-checkpoint-tmp-123", "latest", "-1", "1e3", "notes.txt", "٣", ".hidden"]
    name = draw(one(names))
    (root / name).mkdir()
    if draw(booleans()):
        shutil.copytree(root / str(_STEPS[0]), root / name, dirs_exist_ok=True)
    require(_judge(run) == SUCCESS, f"the good checkpoints are hidden by '{name}'")
    return SUCCESS


def check_wrong_step(draw: Draw, folder: pathlib.Path) -> str:
    """A step that was not saved is an error, and one that was is read."""
    step = draw(one([*_STEPS, 0, -1, 4, 10**12]))
    outcome = _judge(_whole["folder"], must_fail=step not in _STEPS, step=step)
    require((outcome == SUCCESS) == (step in _STEPS), f"step {step}: {outcome}")
    return outcome


def check_config(draw: Draw, folder: pathlib.Path) -> str:
    """A config that is damaged, of another model, or of none."""
    run, _ = _copy(folder)
    path = run / CONFIG_FILE
    contents = path.read_bytes()
    config = json.loads(contents)
    form = draw(integers(0, 4))
    if form == 0:
        odd = [0, -1, 10**9, "8", None, 0.5, [8], True, 3]
        config["model"]["overrides"][draw(one(sorted(FIELDS)))] = draw(one(odd))
    elif form == 1:
        odd = [None, 3, "no such model", "", [], "tiny_32px\0"]
        config["model"]["name"] = draw(one(odd))
    elif form == 2:
        odd = ["float99", "int8", 3, None, "bfloat16"]
        config["model"][draw(one(["dtype", "param_dtype"]))] = draw(one(odd))
    elif form == 3:
        section = draw(one(["model", "data", "ema", "loss"]))
        config[section] = draw(one([3, None, [], "text", {"unknown": 1}, {"a.b": 1}]))
    path.write_text(json.dumps(config))
    if form == 4:
        path.write_bytes(draw(damaged(contents) | one(NO_OBJECT)))
    return _judge(run)


def check_no_run(draw: Draw, folder: pathlib.Path) -> str:
    """Empty directories, files, and runs that never saved."""
    run, _ = _copy(folder)
    form = draw(integers(0, 4))
    if form == 0:
        (run / CONFIG_FILE).unlink()
    elif form == 1:
        run = folder / "empty"
        run.mkdir()
    elif form == 2:
        shutil.rmtree(run / CHECKPOINT_DIRECTORY / str(_STEPS[-1]))
        return _judge(run)  # an earlier checkpoint is left
    else:
        shutil.rmtree(run / CHECKPOINT_DIRECTORY)
        if form == 3:
            (run / CHECKPOINT_DIRECTORY).mkdir()
    return _judge(run, must_fail=True)
