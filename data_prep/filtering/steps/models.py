"""Models that steps take embeddings from: loaded once in a worker, and known by their files."""

from __future__ import annotations

import functools
import hashlib
import os
from typing import Any

from diht_jax.data.records.remote import is_remote
from diht_jax.weights.releases import RELEASES

_READ_BYTES = 2**22


@functools.lru_cache(maxsize=4)  # several steps may have a model of their own
def load(model: str, batch_size: int) -> Any:
    """The model; loaded once in a worker. JAX is imported where it is needed."""
    from diht_jax.loading import load_model

    return load_model(model, batch_size=batch_size)


@functools.lru_cache(maxsize=4)
def fingerprint(model: str, name: str) -> str:
    """What changes with the model, without loading it: of a file its bytes, of a folder its files.

    A released model is its name: its bytes are checked when it is loaded.

    Args:
        model: for `diht_jax.load_model`.
        name: key of the config, for errors.

    Raises:
        ValueError: there is no such model.
    """
    digest = hashlib.blake2b(digest_size=16)
    if os.path.isfile(model):
        with open(model, "rb") as file:
            while data := file.read(_READ_BYTES):
                digest.update(data)
        return digest.hexdigest()
    if not os.path.isdir(model):
        if model not in RELEASES and not is_remote(model):
            raise ValueError(
                f"{name}='{model}': no such work directory or weight file, and no "
                f"released model ({', '.join(RELEASES)})"
            )
        return model
    for folder, folders, names in os.walk(model):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            state = os.stat(path)
            described = f"{os.path.relpath(path, model)}\n{state.st_size}\n{state.st_mtime_ns}\n"
            digest.update(described.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
