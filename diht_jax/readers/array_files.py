"""NumPy's `.npy` and `.npz` from anywhere, read without trusting what their headers claim.

They are for arrays that others made: `numpy.load` would reserve the memory for any shape that a
header states, and its parser of headers raises nearly any type.
"""

from __future__ import annotations

import io
import math
import os
import tokenize
import zipfile
import zlib
from typing import BinaryIO

import numpy as np

from diht_jax.storage.retries import is_storage_failure

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_BAD_HEADER = (
    *(ValueError, TypeError, KeyError, OverflowError, AttributeError, EOFError),
    *(SyntaxError, tokenize.TokenError, RecursionError, MemoryError),
)
_BAD_ARCHIVE = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError),
    *(NotImplementedError, RuntimeError, ValueError, OverflowError),
)


def parse_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of an `.npy` file.

    Raises:
        ValueError: damaged, cut off, or of Python objects, which only pickle could read.
    """
    return _read_array(io.BytesIO(data), len(data))


def read_npz_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """One array of an `.npz` file.

    Args:
        path: of the file.
        name: of the array.

    Raises:
        ValueError: no such array, or the file is damaged; names it.
    """
    member = f"{name}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if member in names:
                with archive.open(member) as file:
                    array = _read_array(file, archive.getinfo(member).file_size)
                    if not file.read(1):  # so that the checksum is looked at as well
                        return array
                raise ValueError(f"array '{name}' has more bytes than its shape needs")
    except _BAD_ARCHIVE as error:
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: cannot be read as npz: {error}") from error
    found = ", ".join(names[:10]) or "nothing"
    raise ValueError(f"{path}: no field '{name}'; it has {found}")


def _read_array(file: BinaryIO, num_bytes: int) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(file)
        shape, is_fortran, dtype = _HEADERS[version](file)
        size = math.prod(shape) * dtype.itemsize
    except _BAD_HEADER as error:
        raise ValueError(f"no whole header of an array ({type(error).__name__})") from error
    if dtype.hasobject:
        raise ValueError("an array of Python objects, which are not read; save numbers or texts")
    if min(shape, default=0) < 0 or size > num_bytes:
        raise ValueError(f"an array of shape {shape} and {dtype} in {num_bytes} bytes")
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f"cut off within an array of shape {shape}")
    if not size:
        return np.zeros(shape, dtype)
    flat = np.frombuffer(data, dtype)
    return flat.reshape(shape, order="F" if is_fortran else "C")
