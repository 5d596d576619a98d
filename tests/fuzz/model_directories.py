"""Directories of models: configs of another type or another model, indices of shards, odd files.

Part of the kind `weights.py`.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from diht_jax.weights import clip_layout, huggingface, settings
from diht_jax.weights.source import read_weights
from tests.fuzz.cases import DEEP_JSON, ERROR, NOT_UTF8, SUCCESS, Draw, Refused, attempt, require
from tests.fuzz.weight_files import (
    ARCH,
    read_both,
    require_equal,
    safetensors_file,
    tensors,
    torch_file,
)


def _model_directory(draw: Draw, folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]]:
    """A directory of Hugging Face or open_clip; returns the path of its config and its contents."""
    if draw.random() < 0.5:
        values = huggingface.to_huggingface(tensors(), ARCH)
        values = {name: np.array(value, order="C") for name, value in values.items()}
        (folder / "model.safetensors").write_bytes(safetensors.numpy.save(values))
        return folder / "config.json", settings.huggingface_config(ARCH, "float32")
    (folder / "open_clip_model.safetensors").write_bytes(safetensors_file())
    config = settings.open_clip_config(ARCH, settings.Preprocessing())
    return folder / "open_clip_config.json", config


def _damaged_config(draw: Draw, folder: pathlib.Path) -> str:
    path, config = _model_directory(draw, folder)
    contents = json.dumps(config).encode()
    path.write_bytes(
        draw.choice([draw.damage(contents), DEEP_JSON, b"[]", b"null", b"{}", b"", *NOT_UTF8])
    )
    found = read_both(folder)
    if isinstance(found, Refused):
        return ERROR
    require_equal(found, tensors())
    return SUCCESS


def _odd_config(draw: Draw, folder: pathlib.Path) -> str:
    """A setting of another type, or of a model that no memory holds."""
    path, config = _model_directory(draw, folder)
    nodes = [config, *(v for v in config.values() if isinstance(v, dict))]
    nodes += [v for node in nodes[1:] for v in node.values() if isinstance(v, dict)]
    node = draw.choice(nodes)
    name = draw.choice(sorted(node))
    before = node[name]
    odd = ["text", None, True, [1], {}, -1, 0, 0.5, 10**9, 10**30, float("nan"), "9" * 50, [], 64]
    node[name] = draw.choice(odd)
    path.write_text(json.dumps(config))
    found = read_both(folder)
    if isinstance(found, Refused):
        return ERROR
    # What does not matter for the shapes, or is left at its default, may pass.
    require_equal(found, tensors())
    require(
        node[name] == before
        or name not in ("layers", "width", "num_hidden_layers", "hidden_size", "patch_size")
        or node[name] is None,
        f"{name}={node[name]!r}",
    )
    return SUCCESS


def _odd_preprocessing(draw: Draw, folder: pathlib.Path) -> str:
    values = huggingface.to_huggingface(tensors(), ARCH)
    values = {name: np.array(value, order="C") for name, value in values.items()}
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(values))
    config = json.dumps(settings.huggingface_config(ARCH, "float32"))
    (folder / "config.json").write_text(config)
    content = settings.huggingface_preprocessor(ARCH, settings.Preprocessing())
    name = draw.choice(["image_mean", "image_std", "do_resize", "resample"])
    content[name] = draw.choice(
        [
            3,
            "abc",
            [1, 2],
            [1, 2, "x"],
            {},
            [0, 0, 0],
            [1, 2, None],
            True,
            {"a": 1, "b": 2, "c": 3},
            [float("nan")] * 3,
            [[1]] * 3,
        ]
    )
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    result = attempt(lambda: read_weights(folder), path)
    if isinstance(result, Refused):
        return ERROR
    numbers = (*result.preprocessing.mean, *result.preprocessing.std)
    require(all(isinstance(v, int | float) for v in numbers), f"no numbers: {numbers}")
    require(bool(np.isfinite(numbers).all()) and len(numbers) == 6, f"no numbers: {numbers}")
    return SUCCESS


def _shard_index(draw: Draw, folder: pathlib.Path) -> str:
    """Hugging Face's index of shards: names that lead out, in circles, or nowhere."""
    half = len(tensors()) // 2
    items = sorted(tensors().items())
    parts = {"a.safetensors": dict(items[:half]), "b.safetensors": dict(items[half:])}
    for name, part in parts.items():
        (folder / name).write_bytes(safetensors.numpy.save(part))
    weight_map = {key: name for name, part in parts.items() for key in part}
    path = folder / "model.safetensors.index.json"
    bad = draw.choice(sorted(weight_map))
    odd = ["../a.safetensors", "/etc/passwd", "none.safetensors", path.name, "", ".", 3, None, []]
    odd += ["a.safetensors\0", "x" * 300, "\ud800", {}, "config.json"]
    weight_map[bad] = draw.choice(odd)
    contents = json.dumps({"weight_map": weight_map}).encode()
    if draw.random() < 0.3:
        contents = draw.choice(
            [draw.damage(contents), b"{}", b"[]", DEEP_JSON, b'{"weight_map": 3}']
        )
    path.write_bytes(contents)
    found = attempt(lambda: read_weights(path), path, folder)
    if isinstance(found, Refused):
        return ERROR
    require_equal(clip_layout.to_clip(found.params, found.arch), tensors())
    return SUCCESS


def _odd_directory(draw: Draw, folder: pathlib.Path) -> str:
    """Nothing to read, or several things."""
    form = draw.randrange(6)
    target = folder
    if form == 1:
        (folder / "a.pt").write_bytes(torch_file())
        (folder / "b.pt").write_bytes(torch_file())
    elif form == 2:
        (folder / "model.safetensors").mkdir()
    elif form == 3:
        target = folder / "model.onnx"
        target.write_bytes(b"other")
    elif form == 4:
        target = folder / draw.choice(["none", "x" * 300, "a\0b"])
    elif form == 5:
        (folder / "model.safetensors").symlink_to(folder / "nowhere")
    result = attempt(lambda: read_weights(target), folder)
    require(isinstance(result, Refused), "nothing to read, but something was")
    return ERROR


MUTATIONS = {
    "damaged config": _damaged_config,
    "odd config": _odd_config,
    "odd preprocessing": _odd_preprocessing,
    "index of shards": _shard_index,
    "odd directory": _odd_directory,
}
