"""Directories of models: configs of another type or another model, indices of shards, odd files."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy
from hypothesis.strategies import booleans, integers
from hypothesis.strategies import sampled_from as one

from diht_jax.weights import huggingface, settings
from diht_jax.weights.source import read_weights
from tests.fuzz.damage import NO_OBJECT, Draw, damaged
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, must_refuse, require
from tests.fuzz.kinds.small_clip import ARCH, judge_model, safetensors_file, tensors, torch_file

_SHAPES = ("layers", "width", "num_hidden_layers", "hidden_size", "patch_size")
_ODD = ["text", None, True, [1], {}, -1, 0, 0.5, 10**9, 10**30, float("nan"), "9" * 50, [], 64]


def _write_huggingface(folder: pathlib.Path) -> dict[str, Any]:
    """A directory of Hugging Face without its config, which is returned."""
    values = huggingface.to_huggingface(tensors(), ARCH)
    values = {name: np.array(value, order="C") for name, value in values.items()}
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(values))
    return settings.huggingface_config(ARCH, "float32")


def _model_directory(draw: Draw, folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """A directory of Hugging Face or open_clip; returns the path of its config and its contents."""
    if draw(booleans()):
        return folder / "config.json", _write_huggingface(folder)
    (folder / "open_clip_model.safetensors").write_bytes(safetensors_file())
    config = settings.open_clip_config(ARCH, settings.Preprocessing())
    return folder / "open_clip_config.json", config


def check_damaged_config(draw: Draw, folder: pathlib.Path) -> str:
    """A config that is damaged, or no JSON object."""
    path, config = _model_directory(draw, folder)
    path.write_bytes(draw(damaged(json.dumps(config).encode()) | one([*NO_OBJECT, b"{}"])))
    return judge_model(folder)


def check_odd_config(draw: Draw, folder: pathlib.Path) -> str:
    """A setting of another type, or of a model that no memory holds."""
    path, config = _model_directory(draw, folder)
    nodes = [config, *(v for v in config.values() if isinstance(v, dict))]
    nodes += [v for node in nodes[1:] for v in node.values() if isinstance(v, dict)]
    node = nodes[draw(integers(0, len(nodes) - 1))]
    name = draw(one(sorted(node)))
    before, node[name] = node[name], draw(one(_ODD))
    path.write_text(json.dumps(config))
    if judge_model(folder) == ERROR:
        return ERROR
    # What does not matter for the shapes, or is left at its default, may pass.
    may_pass = node[name] == before or name not in _SHAPES or node[name] is None
    require(may_pass, f"{name}={node[name]!r}")
    return SUCCESS


def check_odd_preprocessing(draw: Draw, folder: pathlib.Path) -> str:
    """Means and deviations that are no three numbers."""
    (folder / "config.json").write_text(json.dumps(_write_huggingface(folder)))
    content = settings.huggingface_preprocessor(ARCH, settings.Preprocessing())
    odd = [3, "abc", [1, 2], [1, 2, "x"], {}, [0, 0, 0], [1, 2, None], True, [[1]] * 3]
    odd += [{"a": 1, "b": 2, "c": 3}, [float("nan")] * 3]
    content[draw(one(["image_mean", "image_std", "do_resize", "resample"]))] = draw(one(odd))
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    result = attempt(lambda: read_weights(folder), path)
    if isinstance(result, Refused):
        return ERROR
    numbers = (*result.preprocessing.mean, *result.preprocessing.std)
    require(all(isinstance(v, int | float) for v in numbers), f"no numbers: {numbers}")
    require(bool(np.isfinite(numbers).all()) and len(numbers) == 6, f"no numbers: {numbers}")
    return SUCCESS


def check_shard_index(draw: Draw, folder: pathlib.Path) -> str:
    """Hugging Face's index of shards: names that lead out, in circles, or nowhere."""
    half = len(tensors()) // 2
    items = sorted(tensors().items())
    parts = {"a.safetensors": dict(items[:half]), "b.safetensors": dict(items[half:])}
    for name, part in parts.items():
        (folder / name).write_bytes(safetensors.numpy.save(part))
    weight_map: dict[str, Any] = {key: name for name, part in parts.items() for key in part}
    path = folder / "model.safetensors.index.json"
    odd = ["../a.safetensors", "/etc/passwd", "none.safetensors", path.name, "", ".", 3, None, []]
    odd += ["a.safetensors\0", "x" * 300, "\ud800", {}, "config.json", "a.safetensors"]
    weight_map[draw(one(sorted(weight_map)))] = draw(one(odd))
    contents = json.dumps({"weight_map": weight_map}).encode()
    others = damaged(contents) | one([*NO_OBJECT, b"{}", b'{"weight_map": 3}'])
    path.write_bytes(contents if draw(integers(0, 2)) else draw(others))
    return judge_model(path, folder)


def check_odd_directory(draw: Draw, folder: pathlib.Path) -> str:
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
