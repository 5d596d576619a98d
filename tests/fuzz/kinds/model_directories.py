"""Directories of models: configs of another type or another model, indices of shards, odd files."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import safetensors.numpy
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.weights import huggingface, open_clip_config, settings
from diht_jax.weights.source import read_weights
from tests.fuzz.damage import Draw, changed_json, damage_folder
from tests.fuzz.judge import ERROR, SUCCESS, must_refuse, require
from tests.fuzz.kinds.weights import ARCH, judge_model, safetensors_file, tensors, torch_file


def _write(draw: Draw, folder: pathlib.Path) -> pathlib.Path:
    """A directory of open_clip or Hugging Face, or of a few shards; returns what is to be read."""
    form = draw(integers(0, 2))
    if form == 0:
        half = len(tensors()) // 2
        items = sorted(tensors().items())
        parts = {"a.safetensors": dict(items[:half]), "b.safetensors": dict(items[half:])}
        for name, part in parts.items():
            (folder / name).write_bytes(safetensors.numpy.save(part))
        weight_map = {key: name for name, part in parts.items() for key in part}
        path = folder / "model.safetensors.index.json"
        path.write_text(json.dumps({"weight_map": weight_map}))
        return path
    files = {"open_clip_config.json": open_clip_config.make_config(ARCH, settings.Preprocessing())}
    weights, name = safetensors_file(), "open_clip_model.safetensors"
    if form == 1:
        values = huggingface.to_huggingface(tensors(), ARCH)
        weights = safetensors.numpy.save({n: np.array(v, order="C") for n, v in values.items()})
        name, files = (
            "model.safetensors",
            {
                "config.json": huggingface.make_config(ARCH, "float32"),
                "preprocessor_config.json": huggingface.make_preprocessor(
                    ARCH, settings.Preprocessing()
                ),
            },
        )
    (folder / name).write_bytes(weights)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def check_damaged_files(draw: Draw, folder: pathlib.Path) -> str:
    """Files damaged, swapped or gone: the model that was written, or an error that names one."""
    target = _write(draw, folder)
    kept = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
    damage_folder(draw, folder)
    for path, data in kept.items():
        path.write_bytes(data)  # values have no checksum; `weights.py` damages them
    return judge_model(target, folder)


def check_odd_settings(draw: Draw, folder: pathlib.Path) -> str:
    """A setting or an entry of another type, of another model, or one that leads out."""
    target = _write(draw, folder)
    path = draw(one(sorted(folder.glob("*.json"))))
    content = draw(changed_json(json.loads(path.read_text())))
    path.write_text(json.dumps(content))
    if judge_model(target, folder) == ERROR:
        return ERROR
    values = read_weights(target).preprocessing
    numbers = (*values.mean, *values.std) if values else (0.5,) * 6
    require(all(isinstance(v, int | float) for v in numbers), f"no numbers: {numbers}")
    require(bool(np.isfinite(numbers).all()) and len(numbers) == 6, f"no numbers: {numbers}")
    return SUCCESS


def check_odd_directories(draw: Draw, folder: pathlib.Path) -> str:
    """Nothing to read, or several things."""
    target, form = folder, draw(integers(0, 5))
    if form == 1:
        (folder / "a.pt").write_bytes(torch_file())
        (folder / "b.pt").write_bytes(torch_file())
    elif form == 2:
        (folder / "model.safetensors").mkdir()
    elif form == 3:
        target = folder / "model.onnx"
        target.write_bytes(b"other")
    elif form == 4:
        target = folder / draw(one(["none", "x" * 300, "a\0b"]))
    elif form == 5:
        (folder / "model.safetensors").symlink_to(folder / "nowhere")
    return must_refuse(lambda: read_weights(target), folder)
