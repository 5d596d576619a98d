"""Copies on the local disk of what a run will read again: embeddings, and records to be merged.

The heads learn from some shards, whose embeddings are computed, read for the training, and read
once more for the labels; where labels are merged, so are their records. What lies in a store would
be fetched again each time, where a worker that has just had it can leave a copy on this machine,
and one on another machine can send its embeddings to the driver.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator

import ml_collections

from diht_jax.storage.stores import is_remote

_GB = 10**9


@dataclasses.dataclass(frozen=True)
class Scratch:
    """A local folder of copies.

    Attributes:
        folder: where they lie.
        max_bytes: once they are larger, no more is kept (by a file for each worker at most).
    """

    folder: str
    max_bytes: float

    def keep(self, path: str, data: bytes) -> None:
        """Keeps what was just written to a path, if there is room for it."""
        copy = self.reserve(path, len(data))
        if copy is None:
            return
        with open(f"{copy}.tmp", "wb") as file:
            file.write(data)
        os.replace(f"{copy}.tmp", copy)

    def reserve(self, path: str, num_bytes: int) -> str | None:
        """Where a copy of a path may be written; None where there is no room for it."""
        with os.scandir(self.folder) as entries:
            kept = sum(entry.stat().st_size for entry in entries)
        return None if kept + num_bytes > self.max_bytes else self._copy_of(path)

    def find(self, path: str) -> str:
        """The copy of a path, or the path itself where there is none."""
        return self._copy_of(path) if self.has(path) else path

    def has(self, path: str) -> bool:
        """Whether there is a copy of a path."""
        return os.path.exists(self._copy_of(path))

    def _copy_of(self, path: str) -> str:
        digest = hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
        return os.path.join(self.folder, digest)


@contextlib.contextmanager
def open_scratch(config: ml_collections.ConfigDict, *paths: str) -> Iterator[Scratch | None]:
    """A scratch folder of the driver for a run, removed at its end.

    Args:
        config: of `labelling.config.default_config`.
        *paths: of the output, and of the input where it is read again.

    Yields:
        None where it would save nothing, since none of the paths is in a store.
    """
    if not any(map(is_remote, paths)) or not config.scratch_gb:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="diht_label_") as local:
        yield Scratch(local, config.scratch_gb * _GB)
