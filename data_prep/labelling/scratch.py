"""Copies of embeddings on the local disk, for as long as a run will read them again.

The heads learn from some shards, whose embeddings are computed, read for the training, and read
once more for the labels. What lies in a store would be fetched twice for that, where the worker
that has just computed it can leave a copy on this machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator

import ml_collections

from diht_jax.data.records.remote import is_remote

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
        with os.scandir(self.folder) as entries:
            kept = sum(entry.stat().st_size for entry in entries)
        if kept + len(data) > self.max_bytes:
            return
        copy = self._copy_of(path)
        with open(f"{copy}.tmp", "wb") as file:
            file.write(data)
        os.replace(f"{copy}.tmp", copy)

    def find(self, path: str) -> str:
        """The copy of a path, or the path itself where there is none."""
        copy = self._copy_of(path)
        return copy if os.path.exists(copy) else path

    def _copy_of(self, path: str) -> str:
        digest = hashlib.blake2b(path.encode(), digest_size=16).hexdigest()
        return os.path.join(self.folder, f"{digest}.npz")


@contextlib.contextmanager
def open_scratch(
    config: ml_collections.ConfigDict, folder: str, engine: str
) -> Iterator[Scratch | None]:
    """A scratch folder for a run, removed at its end.

    Args:
        config: of `labelling.config.default_config`.
        folder: of the output.
        engine: one of `engine.ENGINES`.

    Yields:
        None where it would save nothing: a local output, or workers on other machines.
    """
    if not is_remote(folder) or engine != "local" or not config.scratch_gb:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="diht_label_") as local:
        yield Scratch(local, config.scratch_gb * _GB)
