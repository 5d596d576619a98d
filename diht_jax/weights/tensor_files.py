"""Files of named arrays: safetensors and torch's, read without executing what is in them.

Names are taken as they stand in the file; what they mean belongs in `clip_layout.py` and
`huggingface.py`. torch is imported only inside the functions that read or write its format.

TorchScript archives, such as OpenAI's CLIP files, are refused by `torch.load(weights_only=True)`,
and `torch.jit.load` runs the code in them. Their pickle is read here by an unpickler that knows
tensors and nothing else: every class of the archive becomes an inert `_Module`, and any other name
is refused.

A zip archive of torch has checksums. A safetensors file has none, so that one of ours states the
CRC32 of its tensors in its metadata.
"""

from __future__ import annotations

import collections
import io
import json
import math
import os
import pathlib
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

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

# Storages in a TorchScript archive.
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}

_CHECKSUM = "crc32"  # in the metadata of a safetensors file
_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")
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
        tensors = (_read_torchscript if is_torchscript(path) else _read_torch)(path)
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


def write_safetensors(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of any memory order; the file appears whole or not at all."""
    # Not `ascontiguousarray`, which makes vectors of scalars.
    contiguous = {name: np.array(value, order="C") for name, value in tensors.items()}
    with local_output(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        # transformers asks for the first entry.
        metadata = {"format": "pt", _CHECKSUM: _checksum(contiguous)}
        safetensors.numpy.save_file(contiguous, temporary, metadata=metadata)
        _sort_metadata(temporary)
        # The library lets only the owner read its files.
        temporary.chmod(mode)


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


def _read_torchscript(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Dotted name -> array of every parameter and buffer.

    Raises:
        ValueError: the archive is damaged, or its pickle names anything but tensors and modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"expected one data.pkl, found {len(pickles)}")
            root = pickles[0].removesuffix("data.pkl")
            data = archive.read(pickles[0])
            _check_memo(data)
            module = _TensorUnpickler(io.BytesIO(data), archive, root).load()
            return _collect(module, len(data))
    except Exception as error:  # of a damaged or hostile pickle, nearly any type
        raise ValueError(
            f"{path}: the TorchScript archive cannot be read: {error!s:.300}"
        ) from error


class _Module:
    """Stands for any class of the archive; holds what its pickle set and can do nothing."""

    attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _StorageType(NamedTuple):
    dtype: Any


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, file: Any, archive: zipfile.ZipFile, root: str):
        super().__init__(file, encoding="utf-8")
        self._archive, self._root = archive, root
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _STORAGES:
            return _StorageType(_STORAGES[name])
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _view_of_storage,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("collections", "OrderedDict"): collections.OrderedDict,
        }
        if module == "torch.jit._pickle":
            return lambda *args: args[0] if args else []
        if (module, name) in known:
            return known[module, name]
        raise pickle.UnpicklingError(
            f"refused: its pickle asks for '{module}.{name}', which is neither a tensor nor a "
            "module, and could run code of whoever made it"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage_type, key, _, _ = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise pickle.UnpicklingError(f"refused: unknown kind of storage {kind!r}")
        if key not in self._storages:
            data = self._archive.read(f"{self._root}data/{key}")
            self._storages[key] = np.frombuffer(data, storage_type.dtype)
        return self._storages[key]


def _check_memo(data: bytes) -> None:
    """Rejects positions in the memo that no pickle of this size needs.

    Python's unpickler makes room for all positions up to the highest, of which a few bytes can name
    billions. Reading the opcodes first also finds texts that reach beyond the end.
    """
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in _MEMO_OPCODES and (argument or 0) > len(data):
            raise pickle.UnpicklingError(f"its pickle has {argument} objects in {len(data)} bytes")


def _view_of_storage(
    storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any
) -> np.ndarray:
    """A strided view, which must be inside of its storage."""
    if any(size < 0 for size in shape) or any(stride < 0 for stride in strides) or offset < 0:
        raise ValueError(f"tensor of shape {shape}, strides {strides}, offset {offset}")
    last = offset + sum((s - 1) * stride for s, stride in zip(shape, strides, strict=True))
    num_elements = math.prod(shape)
    if num_elements and (last >= storage.size or num_elements > storage.size):
        raise ValueError(f"tensor of shape {shape} reaches beyond its {storage.size} elements")
    strides_bytes = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, strides_bytes)


def _collect(root: Any, max_modules: int) -> dict[str, np.ndarray]:
    """Dotted name -> array, of a module and those in it, in the order of their attributes."""
    tensors: dict[str, np.ndarray] = {}
    found = 0

    def visit(prefix: str, module: Any) -> None:
        nonlocal found
        found += 1
        if found > max_modules:  # modules in each other may be named twice on every level
            raise ValueError(f"modules that are shared make more than {max_modules} of them")
        if not isinstance(module, _Module):
            raise ValueError(f"expected a module, got {type(module).__name__}")
        for name, value in module.attributes.items():
            if isinstance(value, np.ndarray):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, _Module):
                visit(f"{prefix}{name}.", value)

    visit("", root)
    return tensors
