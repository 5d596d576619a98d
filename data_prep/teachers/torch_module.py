"""Teacher that is any torch module, built by a function given as `module:function`.

`efficientnet_lite.py` contains an example of such a function.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
from collections.abc import Generator
from typing import Any

import ml_collections
import numpy as np
from ml_collections.config_dict import placeholder

from data_prep.teachers import base
from diht_jax.input import transforms


def default_config() -> ml_collections.ConfigDict:
    """Returns the default config section `teacher.torch`."""
    c = ml_collections.ConfigDict()
    c.function = placeholder(str)  # "module:function", which returns a torch.nn.Module
    c.image_size = 224  # px
    c.mean = base.IMAGENET_MEAN  # per channel, for values in [0, 1]
    c.std = base.IMAGENET_STD  # per channel
    return c


def describe(config: ml_collections.ConfigDict) -> base.TeacherInfo:
    """Builds the module to describe it; its parameters are part of the identity.

    Raises:
        ValueError: torch is not installed, or the function is missing or returns no torch module.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config.teacher.kind='torch': {error.name} is not installed; run: pip install torch "
            "(or 'diht_jax[prep]', with the network of --config prep/concepts_efficientnet)"
        ) from error

    identity = {
        "kind": "torch",
        "function": config.function,
        "weights_sha256": _hash_state(_build(config.function)),
        "image_size": config.image_size,
        "mean": list(config.mean),
        "std": list(config.std),
    }
    return base.TeacherInfo(
        identity, in_this_process=torch.cuda.is_available(), name=config.function
    )


def load(config: ml_collections.ConfigDict, batch_size: int) -> base.ImageTeacher:
    """Builds the module, on the GPU if there is one, else on the CPU.

    It takes float32 [b, 3, size, size], normalised with `mean` and `std`, and returns [b, d].
    """
    import torch

    info = describe(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = _build(config.function).eval().requires_grad_(False).to(device)
    mean, std = tuple(config.mean), tuple(config.std)

    def encode(images: np.ndarray) -> np.ndarray:
        pixels = transforms.normalize(images, mean=mean, std=std).transpose(0, 3, 1, 2)
        with torch.inference_mode(), _one_thread(torch):
            found = module(torch.from_numpy(np.ascontiguousarray(pixels)).to(device))
        if not isinstance(found, torch.Tensor):
            raise ValueError(
                f"config.teacher.torch.function='{config.function}': its module gave a "
                f"{type(found).__name__}; expected a tensor [b, d]"
            )
        return found.float().cpu().numpy()  # NumPy has no bfloat16

    return base.ImageTeacher(encode, info, image_size=config.image_size, batch_size=batch_size)


@contextlib.contextmanager
def _one_thread(torch: Any) -> Generator[None]:
    # On a CPU, workers provide the parallelism. One thread in each process also makes the order of
    # summation the same everywhere.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.lru_cache(maxsize=1)
def _build(spec: str | None) -> Any:
    import torch

    module = _call_function(spec)
    if not isinstance(module, torch.nn.Module):
        raise ValueError(
            f"config.teacher.torch.function='{spec}' returned a {type(module).__name__}; expected "
            "a torch.nn.Module"
        )
    return module


def _hash_state(module: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).to(torch.float64).numpy().data)
    return digest.hexdigest()


def _call_function(spec: str | None) -> Any:
    module_name, colon, name = (spec or "").partition(":")
    if not (module_name and colon and name):
        raise ValueError(
            f"config.teacher.torch.function={spec!r}; expected module:function, such as "
            "data_prep.teachers.efficientnet_lite:build"
        )
    try:
        function = getattr(importlib.import_module(module_name), name, None)
        if function is None:
            raise ValueError(f"config.teacher.torch.function='{spec}': no '{name}' there")
        return function()
    except ModuleNotFoundError as error:
        raise ValueError(
            f"config.teacher.torch.function='{spec}': {error}; the module, and those that it "
            "imports, must be on PYTHONPATH or installed"
        ) from error


TEACHER = base.TeacherKind(default_config, describe, load)
