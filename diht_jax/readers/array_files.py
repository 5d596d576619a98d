"""Reads NumPy's `.npy` and `.npz` files without ever unpickling anything."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np

from diht_jax.storage.stores import is_storage_failure


def parse_npy(data: bytes) -> np.ndarray:
    """Parses the array in the bytes of an `.npy` file; ValueError if damaged or pickled."""
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the header parser raises nearly any type
        raise ValueError(f"no whole array ({type(error).__name__}: {error})") from error


def read_npz_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """Reads one array of an `.npz` file; a ValueError names a file that is damaged or lacks it."""
    member = f"{name}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if member in names:
                # Reading all of it checks the checksum.
                return parse_npy(archive.read(member))
    except Exception as error:  # nearly any type for a damaged archive
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: cannot be read as npz: {error!s:.200}") from error
    found = ", ".join(names[:10]) or "nothing"
    raise ValueError(f"{path}: no field '{name}'; it has {found}")
