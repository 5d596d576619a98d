"""The parameters of a TorchScript archive, such as OpenAI's CLIP files, without running it.

`torch.load(weights_only=True)` refuses these archives and `torch.jit.load` runs the code in them.
Their pickle is read here by an unpickler that knows tensors and nothing else: every class of the
archive becomes an inert `_Module`, and any other name is refused. Needs no torch.
"""

from __future__ import annotations

import collections
import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
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

_MEMO_OPCODES = ("PUT", "BINPUT", "LONG_BINPUT")


def is_torchscript(path: pathlib.Path) -> bool:
    """Tells a TorchScript archive from a plain torch file.

    Looks at the checksums of a zip archive, which torch does not; raises ValueError for damage.
    """
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if "/data/" in info.filename and info.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"'{info.filename[:200]}' is compressed, which torch does not")
            damaged = archive.testzip()
            if damaged is not None:
                raise ValueError(f"the checksum of '{damaged[:200]}' differs")
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception as error:  # On damaged bytes the library raises nearly any type.
        raise ValueError(
            f"{path}: not a whole torch file ({error!s:.200}); download or write it again"
        ) from error


def read_torchscript(path: pathlib.Path) -> dict[str, np.ndarray]:
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
            return _collect("", _TensorUnpickler(io.BytesIO(data), archive, root).load())
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
        if module == "torch" and name in _DTYPES:
            return _StorageType(_DTYPES[name])
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
        if opcode.name in _MEMO_OPCODES and argument > len(data):
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


def _collect(prefix: str, module: Any) -> dict[str, np.ndarray]:
    """Dotted name -> array, of a module and those in it, in the order of their attributes."""
    if not isinstance(module, _Module):
        raise ValueError(f"expected a module, got {type(module).__name__}")
    tensors: dict[str, np.ndarray] = {}
    for name, value in module.attributes.items():
        if isinstance(value, np.ndarray):
            tensors[f"{prefix}{name}"] = value
        elif isinstance(value, _Module):
            tensors |= _collect(f"{prefix}{name}.", value)
    return tensors
