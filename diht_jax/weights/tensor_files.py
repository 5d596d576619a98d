"""Files of named arrays: safetensors and torch's, read without executing what is in them.

Names are taken as they stand in the file; what they mean belongs in `clip_layout.py` and
`huggingface.py`. torch is imported only inside the functions that read or write its format.

`torch.load(weights_only=True)` refuses TorchScript archives, such as OpenAI's CLIP files, and
`torch.jit.load` runs the code in them. Without their code they are plain files of torch, whose
classes `_Module` stands for.

A zip archive of torch has checksums. A safetensors file has none, so that one of ours states the
CRC32 of its tensors in its metadata, and that of the settings which the files next to it hold.
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

# Where training programs keep the model's part of a checkpoint.
_STATE_DICT_KEYS = ("state_dict", "model", "model_state_dict", "module")
_MAX_DEPTH = 8
# What wrappers (data parallelism, torch.compile) put before every name.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")

_CHECKSUM = "crc32"  # in the metadata of a safetensors file
# Names and sizes of a model's parameters, or its code.
_LARGEST_TEXT_BYTES = 2**26
# Tensors may share a storage, and are each a copy on a device. A few may be tied; were all of a
# file to share one, some bytes of it would fill any memory.
_MAX_COPIES = 4
_FREE_BYTES = 2**26


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a weight file, or the shards of an index file: name -> array, in its dtype.

    Args:
        path: `.safetensors`; `.pt`, `.pth`, `.ckpt` or `.bin` of torch (a state dict, a training
            checkpoint with one inside, or a TorchScript archive); or Hugging Face's
            `*.index.json`, which names its shards.

    Raises:
        ValueError: another kind of file, a damaged one, one whose pickle holds anything but
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
    """Writes arrays of any memory order; the file appears whole or not at all."""
    # Not `ascontiguousarray`, which makes vectors of scalars.
    contiguous = {name: np.array(value, order="C") for name, value in tensors.items()}
    with local_output(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # transformers asks for the first entry.
        metadata |= {"format": "pt", _CHECKSUM: _checksum(contiguous)}
        safetensors.numpy.save_file(contiguous, temporary, metadata=metadata)
        _sort_metadata(temporary)
        # The library lets only the owner read its files.
        temporary.chmod(mode)


def read_metadata(path: pathlib.Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty for a file of another kind."""
    if path.suffix != SAFETENSORS_SUFFIX:
        return {}
    with safetensors.safe_open(path, framework="np") as file:
        return file.metadata() or {}


def _sort_metadata(path: pathlib.Path) -> None:
    """Brings the metadata of a safetensors file into one order: equal tensors give equal bytes."""
    with open(path, "r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        file.write(text.encode().ljust(size))


def _checksum(tensors: Mapping[str, np.ndarray]) -> str:
    """CRC32 of names, dtypes, shapes and values, 8 hexadecimal digits."""
    names = sorted(tensors)
    facts = [[name, str(tensors[name].dtype), tensors[name].shape] for name in names]
    checksum = zlib.crc32(json.dumps(facts).encode())
    for name in names:
        checksum = zlib.crc32(
            np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data, checksum
        )
    return f"{checksum:08x}"


def write_torch(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a plain torch state dict; the file appears whole or not at all."""
    torch = _import_torch(path)
    state = {name: _to_torch(torch, value) for name, value in tensors.items()}
    with local_output(path) as temporary:
        torch.save(state, temporary)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            stated = (file.metadata() or {}).get(_CHECKSUM)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The library meets number formats that NumPy does not have with errors of its own kinds.
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
    if is_torchscript(path):
        state = _read_torchscript(torch, path)
    else:
        state = _find_state_dict(torch, path, _load(torch, path, path))
    return {str(name): _to_numpy(torch, path, str(name), value) for name, value in state.items()}


def _load(torch: Any, path: pathlib.Path, content: Any, allowed: Sequence[Any] = ()) -> Any:
    """The content of a torch file, of whose pickle no more is taken than is allowed.

    The content is at the path, or in a file of bytes. Allowed are pairs of what stands for a class
    or function, and its full name in the file.
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
    except Exception as error:  # On damaged bytes torch raises nearly any type.
        raise ValueError(
            f"{path}: not a whole torch file ({_first_line(error)}); download or write it again"
        ) from error


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


def is_torchscript(path: pathlib.Path) -> bool:
    """Tells a TorchScript archive from a plain torch file.

    Looks at the checksums of a zip archive, which torch does not; raises ValueError for damage.
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
    except Exception as error:  # On damaged bytes the library raises nearly any type.
        raise ValueError(
            f"{path}: not a whole torch file ({error!s:.200}); download or write it again"
        ) from error


class _Module:
    """Stands for any class of an archive; holds what its pickle set and can do nothing."""

    attributes: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _read_torchscript(torch: Any, path: pathlib.Path) -> dict[str, Any]:
    """Dotted name -> tensor of every parameter and buffer."""
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
    """A list or a value, without what TorchScript says about its type."""
    return values[0] if values else []


def _collect(torch: Any, path: pathlib.Path, root: Any, most_modules: int) -> dict[str, Any]:
    """Dotted name -> tensor, of a module and those in it."""
    tensors: dict[str, Any] = {}
    modules, found = [("", root)] if isinstance(root, _Module) else [], 0
    while modules:
        prefix, module = modules.pop()
        found += 1
        if found > most_modules:  # modules in each other may be named twice on every level
            raise ValueError(f"{path}: modules that are shared make over {most_modules} of them")
        for name, value in module.attributes.items():
            if torch.is_tensor(value):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                modules.append((f"{prefix}{name}.", value))
    return tensors
