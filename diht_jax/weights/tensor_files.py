"""Files of named arrays: safetensors and torch's formats, read without executing their code.

Names are returned as in the file; `clip_layout.py` and `huggingface.py` interpret them. torch is
only imported in the functions that read or write its format.

`torch.load(weights_only=True)` rejects TorchScript archives, such as OpenAI's CLIP files, and
`torch.jit.load` runs the code in them. Apart from their code they are plain torch files, with
classes that `_Module` replaces.

A zip archive of torch has checksums. A safetensors file has none; ours therefore store in their
metadata a CRC32 of their tensors, and one of the settings in the files next to them.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from diht_jax.storage.files import local_output

SAFETENSORS_SUFFIX = ".safetensors"
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")
INDEX_SUFFIX = ".index.json"
WEIGHT_SUFFIXES = (SAFETENSORS_SUFFIX, *TORCH_SUFFIXES)

# Keys under which training programs store the model's state dict in a checkpoint.
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")
_MAX_DEPTH = 8
# Prefixes that wrappers (data parallelism, torch.compile) add to every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_CHECKSUM = "crc32"  # key in the metadata of a safetensors file
# Limit for the names and sizes of a model's parameters, or its code.
_LARGEST_TEXT_BYTES = 2**26
# Tensors may share a storage, but each becomes a copy on a device. A few tied tensors are normal;
# if all tensors of a file shared one, a small file could fill any memory.
_MAX_COPIES = 4
_FREE_BYTES = 2**26


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a weight file, or the shards of an index file: name -> array, in its dtype.

    Args:
        path: `.safetensors`; `.pt`, `.pth`, `.ckpt` or `.bin` of torch (a state dict, a training
            checkpoint with one inside, or a TorchScript archive); or Hugging Face's
            `*.index.json`, which names its shards.

    Raises:
        ValueError: another kind of file, a damaged one, one whose pickle holds more than
            tensors and plain containers, or one whose tensors share most of their bytes.
    """
    path = pathlib.Path(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_index(path)
    if path.suffix == SAFETENSORS_SUFFIX:
        return _read_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        tensors = _read_torch(path)
        limit = _MAX_COPIES * path.stat().st_size + _FREE_BYTES
        if sum(tensor.nbytes for tensor in tensors.values()) > limit:
            raise ValueError(
                f"{path}: tensors that share their storage would take over {limit >> 20} MiB, "
                f"while the file has {path.stat().st_size >> 10} KiB; save them without views of "
                "each other"
            )
        return _strip_wrappers(tensors)
    raise ValueError(
        f"{path}: not a weight file; expected a name ending in {', '.join(WEIGHT_SUFFIXES)}"
    )


def write_safetensors(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], **metadata: str
) -> None:
    """Writes arrays of any memory order, atomically."""
    # Not `ascontiguousarray`, which converts scalars to vectors.
    contiguous = {name: np.array(value, order="C") for name, value in tensors.items()}
    with local_output(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # transformers requires the "format" entry.
        metadata |= {"format": "pt", _CHECKSUM: _checksum(contiguous)}
        safetensors.numpy.save_file(contiguous, temporary, metadata=metadata)
        _sort_metadata(temporary)
        # safetensors creates files that only the owner can read.
        temporary.chmod(mode)


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file; empty for other kinds of files."""
    if path.suffix != SAFETENSORS_SUFFIX:
        return {}
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata() or {}


def _sort_metadata(path: pathlib.Path) -> None:
    """Sorts the metadata of a safetensors file, so that equal tensors give equal bytes."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.write(text.encode().ljust(size))


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the CRC32 of names, dtypes, shapes and values, as 8 hexadecimal digits."""
    names = sorted(tensors)
    facts = [[name, str(tensors[name].dtype), tensors[name].shape] for name in names]
    checksum = zlib.crc32(json.dumps(facts).encode())
    for name in names:
        checksum = zlib.crc32(
            np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data, checksum
        )
    return f"{checksum:08x}"


def write_torch(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a plain torch state dict, atomically."""
    torch = _import_torch(path)
    state = {name: _to_torch(torch, value) for name, value in tensors.items()}
    with local_output(path) as temporary:
        torch.save(state, temporary)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            stated = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # For number formats that NumPy lacks, the library raises errors of various types.
    except (safetensors.SafetensorError, OSError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file that NumPy can hold ({_first_line(error)}); "
            "download or write it again"
        ) from error
    if stated is not None and stated != _checksum(tensors):
        raise ValueError(
            f"{path}: damaged: the checksum of its tensors is {_checksum(tensors)}, and the file "
            f"states {stated}; copy or export it again"
        )
    return tensors


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
        # A name with folders could lead out of the model's own directory, and an index that
        # refers to an index could form a cycle.
        is_plain = isinstance(name, str) and pathlib.PurePath(name).name == name
        if not is_plain or not name.endswith(WEIGHT_SUFFIXES) or "\0" in name:
            raise ValueError(f"{path}: shard {name!r:.200} is no plain name of a weight file")
        if not os.path.isfile(path.parent / name):
            raise ValueError(f"{path}: shard {name!r:.200} is missing; download it as well")
        tensors |= read_tensors(path.parent / name)
    return tensors


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    torch = _import_torch(path)
    if is_torchscript(path):
        state = _read_torchscript(torch, path)
    else:
        state = _find_state_dict(torch, path, _load(torch, path, path))
    return {str(name): _to_numpy(torch, path, str(name), value) for name, value in state.items()}


def _load(torch: Any, path: pathlib.Path, content: Any, allowed: Sequence[Any] = ()) -> Any:
    """Loads a torch file, unpickling only tensors, plain containers and allowed names.

    `content` is a path or a file of bytes. `allowed` pairs a replacement for a class or function
    with its full name in the file.
    """
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(content, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused: its pickle holds more than tensors and plain containers"
            f"{_refused_part(error)}, and could run code of whoever made it. Take a .safetensors "
            "version, or let whoever made it save a plain state dict"
        ) from error
    except Exception as error:  # torch raises nearly any type for damaged bytes
        raise ValueError(
            f"{path}: not a whole torch file ({_first_line(error)}); download or write it again"
        ) from error


def _find_state_dict(torch: Any, path: pathlib.Path, loaded: Any) -> Mapping[str, Any]:
    # Bounded, since a dict may contain itself.
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
    """Returns the name that torch rejected, such as " (posix.system)", without its advice."""
    found = re.search(r"GLOBAL ([\w.]+)|(Unsupported operand \d+)", str(error))
    return f" ({(found[1] or found[2])[:200]})" if found else ""


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def is_torchscript(path: pathlib.Path) -> bool:
    """Distinguishes a TorchScript archive from a plain torch file.

    Verifies the checksums of a zip archive, which torch does not; raises ValueError for damage.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED and (
                    "/data/" in info.filename or info.file_size > _LARGEST_TEXT_BYTES
                ):
                    raise ValueError(f"'{info.filename[:200]}' is compressed, which torch does not")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of '{damaged[:200]}' differs")
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception as error:  # the library raises nearly any type for damaged bytes
        raise ValueError(
            f"{path}: not a whole torch file ({error!s:.200}); download or write it again"
        ) from error


class _Module:
    """Replaces any class of an archive; holds the state that its pickle sets, and has no code."""

    attributes: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _read_torchscript(torch: Any, path: pathlib.Path) -> dict[str, Any]:
    """Returns every parameter and buffer by dotted name."""
    plain = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(plain, "w") as copy:
        for name in archive.namelist():
            if "/code/" not in name and not name.endswith("/constants.pkl"):
                copy.writestr(name, archive.read(name))
        most = sum(i.file_size for i in archive.infolist() if i.filename.endswith("/data.pkl"))
    try:
        plain.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(plain)
        plain.seek(0)
    except Exception as error:  # as above
        raise ValueError(f"{path}: not a whole torch file ({_first_line(error)})") from error
    allowed: list[Any] = [(_Module, name) for name in names if name.startswith("__torch__.")]
    allowed += [(_first, name) for name in names if name.startswith("torch.jit._pickle.")]
    return _collect(torch, path, _load(torch, path, plain, allowed), most)


def _first(*values: Any) -> Any:
    """Unwraps the first value of a list or a value, dropping TorchScript's type annotations."""
    return values[0] if values else []


def _collect(torch: Any, path: pathlib.Path, root: Any, most_modules: int) -> dict[str, Any]:
    """Returns the tensors of a module and its submodules, by dotted name."""
    tensors: dict[str, Any] = {}
    modules, found = [("", root)] if isinstance(root, _Module) else [], 0
    while modules:
        prefix, module = modules.pop()
        found += 1
        if found > most_modules:  # shared submodules can double the count on every level
            raise ValueError(f"{path}: modules that are shared make over {most_modules} of them")
        for name, value in module.attributes.items():
            if torch.is_tensor(value):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                modules.append((f"{prefix}{name}.", value))
    return tensors
