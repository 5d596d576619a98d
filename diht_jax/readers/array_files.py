"""NumPy's `.npy` and `.npz` from anywhere; no pickle in them is read."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from typing import IO

import numpy as np

from diht_jax.storage.stores import is_storage_failure

_BAD_ARCHIVE = (
    zipfile.BadZipFile,
    zlib.error,
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    OverflowError,
)


def parse_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of an `.npy` file; ValueError where there is none without pickle."""
    return _read_array(io.BytesIO(data))


def read_npz_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """One array of an `.npz` file; a ValueError names the file where it is damaged, or has none."""
    member = f"{name}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if member in names:
                with archive.open(member) as file:
                    array = _read_array(file)
                    if not file.read(1):  # so that the checksum is looked at as well
                        return array
                raise ValueError(f"array '{name}' has more bytes than its shape needs")
    except _BAD_ARCHIVE as error:
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: cannot be read as npz: {error!s:.200}") from error
    found = ", ".join(names[:10]) or "nothing"
    raise ValueError(f"{path}: no field '{name}'; it has {found}")


def _read_array(file: IO[bytes]) -> np.ndarray:
    try:
        return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # the parser of headers raises nearly any type
        if is_storage_failure(error):
            raise
        raise ValueError(f"no whole array ({type(error).__name__}: {error})") from error
