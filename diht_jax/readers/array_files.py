"""NumPy's `.npy` and `.npz` from anywhere; no pickle in them is read."""

from __future__ import annotations

import io
import os
import zipfile

import numpy as np

from diht_jax.storage.stores import is_storage_failure


def parse_npy(data: bytes) -> np.ndarray:
    """The array in the bytes of an `.npy` file; ValueError where there is none without pickle."""
    try:
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # the parser of headers raises nearly any type
        raise ValueError(f"no whole array ({type(error).__name__}: {error})") from error


def read_npz_array(path: str | os.PathLike[str], name: str) -> np.ndarray:
    """One array of an `.npz` file; a ValueError names the file where it is damaged, or has none."""
    member = f"{name}.npy"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if member in names:
                # All of it is read, so that its checksum is compared.
                return parse_npy(archive.read(member))
    except Exception as error:  # of a damaged archive it is of nearly any type
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: cannot be read as npz: {error!s:.200}") from error
    found = ", ".join(names[:10]) or "nothing"
    raise ValueError(f"{path}: no field '{name}'; it has {found}")
