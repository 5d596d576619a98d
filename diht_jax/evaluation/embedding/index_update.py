"""Makes an index of pictures, and brings it up to date with its source."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import filelock
import numpy as np

from diht_jax.data import retries
from diht_jax.data.atomic_file import write_atomically
from diht_jax.data.readers import image_folder, registry
from diht_jax.data.readers.base import Skipped, SourceShard
from diht_jax.data.records.remote import refuse_url
from diht_jax.data.records.schema import Pair
from diht_jax.evaluation.embedding.encoding import encode_images
from diht_jax.evaluation.embedding.files import PICTURES, Peekable, claim
from diht_jax.evaluation.embedding.picture_index import (
    DTYPES,
    Part,
    PictureIndex,
    make_thumbnail,
    quantize,
    read_manifests,
    to_npy,
    write_part,
)
from diht_jax.evaluation.sources.entry_counts import EntryProgress

# Pictures a part: what an interruption can cost.
PART_ROWS = 10_000


@dataclasses.dataclass(frozen=True)
class Update:
    """What `update_index` did.

    Attributes:
        added, removed, kept: numbers of pictures.
        dropped: reason -> entries that were left out, in this update and before.
    """

    added: int
    removed: int
    kept: int
    dropped: dict[str, int]


def update_index(
    model: Any,
    shards: Sequence[SourceShard],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    batch_size: int = 256,
    num_threads: int | None = None,
    thumbnails: bool = True,
) -> Update:
    """Makes the index of a source, or brings it up to date.

    Pictures that were added to a folder are embedded, and those that were changed again; of any
    other source a shard is the unit. What is no longer in the source leaves the index. An update
    that is interrupted loses the part that it was making.

    Args:
        model: a `LoadedModel`.
        shards: of `files.list_inputs`.
        folder: of the index; is made.
        dtype: of the stored embeddings, one of `DTYPES`.
        batch_size: pictures a batch, over all devices.
        num_threads: decoding threads; None is one per core.
        thumbnails: keep a small picture of each entry. Those of a folder of pictures are read
            from there instead.

    Raises:
        ValueError: the folder holds the index of another model or dtype, or another process is
            updating it.
    """
    refuse_url(folder, "index")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)} for an index")
    folder = pathlib.Path(folder)
    settings = {
        "index": 1,
        "model_sha256": model.fingerprint(),
        "image_size": model.image_size,
        "dtype": dtype,
    }
    claim(folder, settings)
    encode = functools.partial(
        encode_images, model, batch_size=batch_size, num_threads=num_threads, allow_empty=True
    )
    with _only_one_update(folder):
        return _Updater(folder, dtype, model.embed_dim, encode, thumbnails).run(shards)


@contextlib.contextmanager
def _only_one_update(folder: pathlib.Path) -> Iterator[None]:
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"--index={folder}: another process is updating it; wait for it") from None
    try:
        yield
    finally:
        lock.release()


class _Updater:
    """One update of an index."""

    def __init__(
        self, folder: pathlib.Path, dtype: str, dim: int, encode: Any, thumbnails: bool
    ) -> None:
        self._folder, self._dtype, self._dim = folder, dtype, dim
        self._encode = encode
        self._thumbnails = thumbnails
        self._manifests = read_manifests(folder)
        self._added = self._removed = 0

    def run(self, shards: Sequence[SourceShard]) -> Update:
        identities = {_unit(shard): shard.identity() for shard in shards}
        for number, manifest in list(self._manifests.items()):
            identity = identities.get(manifest["unit"])
            is_folder = manifest["identity"]["kind"] == PICTURES
            if identity is None or not (is_folder or identity == manifest["identity"]):
                self._remove_part(number)
        with EntryProgress(shards) as progress:
            for shard in shards:
                add = self._add_pictures if shard.kind == PICTURES else self._add_shard
                add(shard, identities[_unit(shard)], progress)
                progress.finish_shard()
        dropped: collections.Counter[str] = collections.Counter()
        for manifest in self._manifests.values():
            dropped.update(manifest["dropped"])
        rows = len(PictureIndex(self._folder)) if self._manifests else 0
        return Update(self._added, self._removed, rows - self._added, dict(dropped))

    def _add_shard(
        self, shard: SourceShard, identity: dict[str, Any], progress: EntryProgress
    ) -> None:
        """Adds the parts of a shard that are missing."""
        done = [m for m in self._manifests.values() if m["unit"] == _unit(shard)]
        progress.update(sum(manifest["entries"] for manifest in done))
        if any(manifest["is_last"] for manifest in done):
            return
        entries = Peekable(registry.read_pairs(shard))
        # Entries of finished parts; images are not decoded.
        collections.deque(
            itertools.islice(entries, sum(manifest["entries"] for manifest in done)), maxlen=0
        )
        is_last = False
        while not is_last:
            taken = itertools.islice(entries, PART_ROWS)
            is_last = self._add_part(shard, identity, taken, progress, entries.is_exhausted)

    def _add_pictures(
        self, shard: SourceShard, identity: dict[str, Any], progress: EntryProgress
    ) -> None:
        """Adds the pictures of a folder that are new or changed, and marks those that are gone."""
        listed = list(image_folder.list_pictures(shard.path))
        states = {
            key: _file_state(path) if reason is None else reason for path, key, reason in listed
        }
        known = set()
        for number, manifest in list(self._manifests.items()):
            if manifest["unit"] == _unit(shard):
                current = {key for key, state in manifest["states"] if states.get(key) == state}
                if self._keep_rows(number, current):
                    known |= current
        new = [entry for entry in listed if entry[1] not in known]
        progress.update(len(listed) - len(new))
        for first in range(0, len(new), PART_ROWS):
            chunk = new[first : first + PART_ROWS]
            entries = image_folder.read_listed(shard.path, chunk)
            of_part = [(key, states[key]) for _, key, _ in chunk]
            self._add_part(shard, identity, entries, progress, lambda: True, of_part)

    def _keep_rows(self, number: int, keys: set[str]) -> bool:
        """Marks the rows of a folder's part with other keys as removed; returns if any is left."""
        part = Part(self._folder, number)
        removed = np.array([key not in keys for key in part.rows["key"].to_pylist()], bool)
        if removed.all():
            self._remove_part(number)
            return False
        if (removed != part.removed).any():
            self._removed += int(removed.sum()) - int(part.removed.sum())
            write_atomically(self._folder / f"{number:05d}.removed.npy", to_npy(removed))
        return True

    def _remove_part(self, number: int) -> None:
        part = Part(self._folder, number)
        self._removed += len(part.rows) - int(part.removed.sum())
        del part, self._manifests[number]
        for suffix in ("json", "removed.npy", "arrow", "npy"):  # what makes it a part goes first
            (self._folder / f"{number:05d}.{suffix}").unlink(missing_ok=True)

    def _add_part(
        self,
        shard: SourceShard,
        identity: dict[str, Any],
        entries: Iterable[Pair | Skipped],
        progress: EntryProgress,
        is_last: Callable[[], bool],
        states: Sequence[tuple[str, str]] = (),
    ) -> bool:
        """Writes a part; returns what `is_last` says behind its last entry."""
        count = 0

        def counted() -> Iterator[Pair | Skipped]:
            nonlocal count
            for entry in entries:
                count += 1
                progress.update(1)
                yield entry

        keeps_thumbnails = self._thumbnails and shard.kind != PICTURES
        encoded = self._encode(
            counted(),
            lambda pair: (
                *(pair.key, pair.caption),
                make_thumbnail(pair.image) if keeps_thumbnails else b"",
            ),
        )
        number = max(self._manifests, default=-1) + 1
        image_emb = encoded.image_emb.reshape(len(encoded.notes), self._dim)
        manifest = {
            "unit": _unit(shard),
            "identity": identity,
            "entries": count,
            "is_last": is_last(),
            "dropped": encoded.dropped,
            "states": list(states),
        }
        write_part(self._folder, number, quantize(image_emb, self._dtype), encoded.notes, manifest)
        self._manifests[number] = manifest
        self._added += len(image_emb)
        return manifest["is_last"]


def _unit(shard: SourceShard) -> str:
    return f"{shard.kind}:{shard.path}[{shard.start}:{shard.stop}]{json.dumps(dict(shard.options))}"


def _file_state(path: str) -> str:
    status = retries.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"
