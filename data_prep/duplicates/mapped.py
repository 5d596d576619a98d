"""Files of a job as local files that can be mapped into memory, wherever they lie.

What lies in a store is fetched once by a machine, into a folder below the system's temporary one;
all processes of the job share it. Columns of numbers are kept as Arrow files: what is read of them
is what is looked at.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from typing import Any

import numpy as np

from diht_jax.storage import files
from diht_jax.storage.copies import cached_copy
from diht_jax.storage.files import input_version
from diht_jax.storage.stores import is_remote


def cache_folder(output: str) -> str:
    """Where the files of an output folder are kept on this machine."""
    digest = hashlib.blake2b(output.encode(), digest_size=8).hexdigest()
    return os.path.join(tempfile.gettempdir(), f"diht_jax-duplicates-{os.getuid()}-{digest}")


def fetch(path: str, cache: str) -> str:
    """The path of a local file with these contents.

    Args:
        path: of a local file, which is its own copy, or a URL.
        cache: of `cache_folder`.
    """
    if not is_remote(path):
        return path
    size, version = input_version(path)
    identity = f"{path}\n{size} {version}"
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return cached_copy(path, digest, size, cache)


def write_columns(path: str, columns: dict[str, Any]) -> None:
    """Writes columns of equal length, NumPy or Arrow arrays, to a file that appears whole."""
    import pyarrow

    batch = pyarrow.record_batch({name: pyarrow.array(part) for name, part in columns.items()})
    with (
        files.local_output(path) as local,
        pyarrow.ipc.new_file(str(local), batch.schema) as writer,
    ):
        writer.write_batch(batch)


def open_batch(path: str, cache: str) -> Any:
    """What `write_columns` wrote, as a record batch that is mapped into memory."""
    import pyarrow

    return pyarrow.ipc.open_file(pyarrow.memory_map(fetch(path, cache))).get_batch(0)


def open_columns(path: str, cache: str) -> dict[str, np.ndarray]:
    """Columns of numbers that `write_columns` wrote, mapped into memory."""
    batch = open_batch(path, cache)
    return {name: batch.column(name).to_numpy() for name in batch.schema.names}


def forget(cache: str) -> None:
    """Removes what was fetched."""
    shutil.rmtree(cache, ignore_errors=True)
