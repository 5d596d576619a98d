"""A very small CLIP in every format that weights come in, and how what is read of it is judged."""

from __future__ import annotations

import functools
import io
import pathlib
import warnings
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from diht_jax.models.zoo import Architecture
from diht_jax.weights import clip_layout
from diht_jax.weights.source import read_weights
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require

FIELDS = {
    **{"image_size": 8, "patch_size": 4, "vision_layers": 1, "vision_width": 8, "vision_heads": 1},
    **{"text_layers": 1, "text_width": 8, "text_heads": 1, "embed_dim": 4},
    **{"context_length": 5, "vocab_size": 12},
}
ARCH = Architecture(**FIELDS)


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    """The model under CLIP's names, with random values."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=shape).astype(np.float32)
        for name, shape in clip_layout.expected_shapes(ARCH).items()
    }


@functools.cache
def safetensors_file() -> bytes:
    """As a safetensors file."""
    return safetensors.numpy.save(tensors(), {"format": "pt"})


@functools.cache
def torch_file(is_legacy: bool = False) -> bytes:
    """As a torch state dict, in the zip format or in the one before it."""
    buffer = io.BytesIO()
    state = {name: torch.from_numpy(value.copy()) for name, value in tensors().items()}
    torch.save(state, buffer, _use_new_zipfile_serialization=not is_legacy)
    return buffer.getvalue()


@functools.cache
def torchscript_file() -> bytes:
    """A TorchScript archive of two layers, as OpenAI published its models."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    return buffer.getvalue()


@functools.cache
def torchscript_tensors() -> dict[str, np.ndarray]:
    """What is in it, as torch itself reads it."""
    module = torch.jit.load(io.BytesIO(torchscript_file()))
    return {name: value.numpy() for name, value in module.state_dict().items()}


def require_equal(found: Any, expected: dict[str, np.ndarray], but: set[str] = frozenset()) -> None:
    """The same names and, but for some, the same values."""
    require(found.keys() == expected.keys(), f"names {sorted(found.keys() ^ expected.keys())[:5]}")
    for name, value in expected.items():
        same = np.array_equal(found[name], value)
        require(same or name in but, f"the values of {name} have changed")


def judge_model(path: pathlib.Path, *names: str | pathlib.Path, but: set[str] = frozenset()) -> str:
    """The model's parameters, but for some, or an error that names the path or another name."""
    weights = attempt(lambda: read_weights(path), path, *names)
    if isinstance(weights, Refused):
        return ERROR
    require_equal(clip_layout.to_clip(weights.params, weights.arch), tensors(), but)
    return SUCCESS
