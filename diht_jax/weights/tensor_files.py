"""Files of named arrays: safetensors and torch's, read without executing what is in them.

Names are taken as they stand in the file; what they mean belongs in `clip_layout.py` and
`huggingface.py`. torch is imported only inside the functions that read or write its format.
"""

from __future__ import annotations

import json
import os
import pathlib
import pickle
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from diht_jax.storage.files import local_output
from diht_jax.weights.torchscript import (
    is_torchscript,
    read_torchscript,
)

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_SUFFIX = ".index.json"
WEIGHT_SUFFIXES = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)

# Where training programs keep the model's part of a checkpoint.
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")
_MAX_DEPTH = 8
# What wrappers (data parallelism, torch.compile) put before every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a weight file, or the shards of an index file: name -> array, in its dtype.

    Args:
        path: `.safetensors`; `.pt`, `.pth`, `.ckpt` or `.bin` of torch (a state dict, a training
            checkpoint with one inside, or a TorchScript archive); or Hugging Face's
            `*.index.json`, which names its shards.

    Raises:
        ValueError: another kind of file, a damaged one, or one whose pickle holds anything but
            tensors and plain containers.
    """
    path = pathlib.Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_index(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _strip_wrappers((read_torchscript if is_torchscript(path) else _read_torch)(path))
    raise ValueError(
        f"{path}: not a weight file; expected a name ending in {', '.join(WEIGHT_SUFFIXES)}"
    )


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of any memory order; the file appears whole or not at all."""
    # Not `ascontiguousarray`, which makes vectors of scalars.
    contiguous = {name: np.array(value, order="C") for name, value in tensors.items()}
    with local_output(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # transformers asks for this entry.
        safetensors.numpy.save_file(contiguous, temporary, metadata={"format": "pt"})
        # The library lets only the owner read its files.
        temporary.chmod(mode)


def write_torch(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a plain torch state dict; the file appears whole or not at all."""
    torch = _import_torch(path)
    state = {name: _to_torch(torch, value) for name, value in tensors.items()}
    with local_output(path) as temporary:
        torch.save(state, temporary)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The library meets number formats that NumPy does not have with errors of its own kinds.
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file that NumPy can hold ({_first_line(error)}); "
            "download or write it again"
        ) from error


def _read_index(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ValueError(
            f"{path}: expected a JSON object with 'weight_map' ({_first_line(error)})"
        ) from error
    tensors: dict[str, np.ndarray] = {}
    for name in names:
        # A name with folders in it could lead out of the model's own directory, and an index
        # that names an index could go round in circles.
        is_plain = isinstance(name, str) and pathlib.PurePath(name).name == name
        if not is_plain or not name.endswith(WEIGHT_SUFFIXES) or "\0" in name:
            raise ValueError(f"{path}: shard {name!r:.200} is no plain name of a weight file")
        if not os.path.isfile(path.parent / name):
            raise ValueError(f"{path}: shard {name!r:.200} is missing; download it as well")
        tensors |= read_tensors(path.parent / name)
    return tensors


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _import_torch(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused: its pickle holds more than tensors and plain containers"
            f"{_refused_part(error)}, and could run code of whoever made it. Take a .safetensors "
            "version, or let whoever made it save a plain state dict"
        ) from error
    except Exception as error:  # On damaged bytes torch raises nearly any type.
        raise ValueError(
            f"{path}: not a whole torch file ({_first_line(error)}); download or write it again"
        ) from error
    state = _find_state_dict(torch, path, loaded)
    return {str(name): _to_numpy(torch, path, str(name), value) for name, value in state.items()}


def _find_state_dict(torch: Any, path: pathlib.Path, loaded: Any) -> Mapping[str, Any]:
    # Bounded, since a dict may hold itself.
    for _ in range(_MAX_DEPTH):
        inner = loaded if isinstance(loaded, Mapping) else {}
        nested = [inner[k] for k in _STATE_DICT_KEYS if isinstance(inner.get(k), Mapping)]
        if not nested:
            break
        loaded = nested[0]
    if isinstance(loaded, Mapping):
        others = [f"{key!s:.80}" for key, value in loaded.items() if not torch.is_tensor(value)]
        if loaded and not others:
            return loaded
        found = f"a dict with {', '.join(others[:5]) or 'nothing'} in it"
    else:
        found = type(loaded).__name__
    raise ValueError(
        f"{path}: expected a state dict (name -> tensor), by itself or under "
        f"{', '.join(_STATE_DICT_KEYS)}; got {found}"
    )


def _strip_wrappers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _WRAPPER_PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _strip_wrappers({name[len(prefix) :]: v for name, v in tensors.items()})
    return tensors


def _to_numpy(torch: Any, path: pathlib.Path, name: str, tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    try:
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: '{name[:200]}' is a tensor of {tensor.dtype}, {tensor.layout} on "
            f"{tensor.device}, which NumPy cannot hold; save it dense, as floating point"
        ) from error


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    array = np.array(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _import_torch(path: pathlib.Path) -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{path}: torch is needed for this format and is not installed; `pip install torch`, "
            "or use the safetensors format"
        ) from error
    return torch


def _refused_part(error: pickle.UnpicklingError) -> str:
    """The name that torch refused, such as " (posix.system)", without its advice."""
    found = re.search(r"GLOBAL ([\w.]+)|(Unsupported operand \d+)", str(error))
    return f" ({(found[1] or found[2])[:200]})" if found else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
