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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import encode_images
from diht_jax.evaluation.embedding.files import Peekable, claim
from diht_jax.evaluation.embedding.inputs import PICTURES, Share, shares_of
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
from diht_jax.evaluation.embedding.process_share import ALONE, JobProcess
from diht_jax.evaluation.sources.entry_counts import EntryProgress
from diht_jax.readers import image_folder, registry
from diht_jax.readers.base import Skipped, SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files
from diht_jax.storage.files import refuse_url, write_bytes
from diht_jax.storage.locks import lock_folder

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
    process: JobProcess = ALONE,
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
        process: of the processes of a job that call this alike, on a folder that all of them see:
            each embeds its share of the shards, or of the pictures of a folder and of the parts of
            few large files.

    Returns:
        What all processes together did.

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
    process.first(lambda: claim(folder, settings))
    encode = functools.partial(
        encode_images, model, batch_size=batch_size, num_threads=num_threads, allow_empty=True
    )
    with contextlib.ExitStack() as stack:
        process.first(lambda: stack.enter_context(lock_folder(folder, "--index", ".lock")))
        return _Updater(folder, dtype, model.embed_dim, encode, thumbnails, process).run(shards)


class _Updater:
    """One update of an index."""

    def __init__(
        self,
        folder: pathlib.Path,
        dtype: str,
        dim: int,
        encode: Any,
        thumbnails: bool,
        process: JobProcess,
    ) -> None:
        self._folder, self._dtype, self._dim = folder, dtype, dim
        self._encode = encode
        self._thumbnails = thumbnails
        self._process = process
        self._manifests: dict[int, dict[str, Any]] = {}
        self._next_number = 0
        self._listed: dict[str, tuple[list[tuple[str, str, str | None]], dict[str, str]]] = {}
        self._removed = 0

    def run(self, shards: Sequence[SourceShard]) -> Update:
        identities = {_unit(shard): shard.identity() for shard in shards}
        self._process.first(lambda: self._remove_stale(shards, identities))
        # Read by all before the first part is made.
        self._manifests = self._process.together(lambda: read_manifests(self._folder))
        # Every process has numbers of its own for the parts that it makes.
        first_new = max(self._manifests, default=-1) + 1
        self._next_number = first_new + self._process.index
        self._process.together(lambda: self._add(shards, identities))
        return self._describe(first_new)

    def _add(self, shards: Sequence[SourceShard], identities: dict[str, dict[str, Any]]) -> None:
        """Makes this process's parts."""
        mine = shares_of(shards, self._process.index, self._process.count)
        with EntryProgress([share.shard for share in mine]) as progress:
            for share in mine:
                add = self._add_pictures if share.shard.kind == PICTURES else self._add_shard
                add(share, identities[_unit(share.shard)], progress)
                progress.finish_shard()

    def _remove_stale(
        self, shards: Sequence[SourceShard], identities: dict[str, dict[str, Any]]
    ) -> None:
        """Removes what is gone or was changed: parts of shards, pictures of folders."""
        self._manifests = read_manifests(self._folder)
        for number, manifest in list(self._manifests.items()):
            identity = identities.get(manifest["unit"])
            is_folder = manifest["identity"]["kind"] == PICTURES
            if identity is None or not (is_folder or identity == manifest["identity"]):
                self._remove_part(number)
        for shard in shards:
            if shard.kind == PICTURES:
                for number, manifest in self._parts_of(shard):
                    self._keep_rows(number, self._unchanged(shard, manifest))

    def _parts_of(self, shard: SourceShard) -> list[tuple[int, dict[str, Any]]]:
        parts = self._manifests.items()
        return [(number, part) for number, part in parts if part["unit"] == _unit(shard)]

    def _list(self, shard: SourceShard) -> tuple[list[tuple[str, str, str | None]], dict[str, str]]:
        """The pictures of a folder as they are listed once, and the state of each by its key."""
        if shard.path not in self._listed:
            listed = list(image_folder.list_pictures(shard.path))
            states = {
                key: _file_state(path) if reason is None else reason for path, key, reason in listed
            }
            self._listed[shard.path] = listed, states
        return self._listed[shard.path]

    def _unchanged(self, shard: SourceShard, manifest: dict[str, Any]) -> set[str]:
        """Keys of a part of a folder whose pictures are as they were."""
        _, states = self._list(shard)
        return {key for key, state in manifest["states"] if states.get(key) == state}

    def _describe(self, first_new: int) -> Update:
        """What was done, where the parts from a number on are new."""
        manifests = read_manifests(self._folder)
        dropped: collections.Counter[str] = collections.Counter()
        for manifest in manifests.values():
            dropped.update(manifest["dropped"])
        rows = len(PictureIndex(self._folder)) if manifests else 0
        new = [number for number in manifests if number >= first_new]
        added = sum(len(Part(self._folder, number).rows) for number in new)
        return Update(added, self._removed, rows - added, dict(dropped))

    def _add_shard(self, share: Share, identity: dict[str, Any], progress: EntryProgress) -> None:
        """Adds this process's parts of a shard that are missing."""
        done = {
            manifest.get("part", rank): manifest
            for rank, (_, manifest) in enumerate(sorted(self._parts_of(share.shard)))
        }
        entries: Peekable | None = None
        read = 0  # entries taken from `entries`
        for part in itertools.count():
            is_last = part in done and done[part]["is_last"]
            if part % share.step == share.first and part in done:
                progress.update(done[part]["entries"])
            elif part % share.step == share.first:
                if entries is None:
                    entries = Peekable(registry.read_pairs(share.shard))
                # Entries of other parts; images are not decoded.
                collections.deque(itertools.islice(entries, part * PART_ROWS - read), maxlen=0)
                if part and entries.is_exhausted():
                    return
                taken = itertools.islice(entries, PART_ROWS)
                own = {"part": part}
                is_last = self._add_part(
                    share.shard, identity, taken, progress, entries.is_exhausted, own
                )
                read = (part + 1) * PART_ROWS
            if is_last:
                return

    def _add_pictures(
        self, share: Share, identity: dict[str, Any], progress: EntryProgress
    ) -> None:
        """Adds this process's share of the pictures of a folder that are new or changed."""
        shard = share.shard
        listed, states = self._list(shard)
        known = {
            key for _, manifest in self._parts_of(shard) for key in self._unchanged(shard, manifest)
        }
        new = [entry for entry in listed if entry[1] not in known]
        progress.update(len(listed) - len(new))
        size = max(1, min(PART_ROWS, -(-len(new) // share.step)))
        for first in range(share.first * size, len(new), share.step * size):
            chunk = new[first : first + size]
            entries = image_folder.read_listed(shard.path, chunk)
            of_part = [(key, states[key]) for _, key, _ in chunk]
            self._add_part(shard, identity, entries, progress, lambda: True, {"states": of_part})

    def _keep_rows(self, number: int, keys: set[str]) -> None:
        """Marks the rows of a folder's part with other keys as removed, or removes the part."""
        part = Part(self._folder, number)
        removed = np.array([key not in keys for key in part.rows["key"].to_pylist()], bool)
        if removed.all():
            self._remove_part(number)
        elif (removed != part.removed).any():
            self._removed += int(removed.sum()) - int(part.removed.sum())
            write_bytes(self._folder / f"{number:05d}.removed.npy", to_npy(removed))

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
        own: Mapping[str, Any],
    ) -> bool:
        """Writes a part, with what is its own in the manifest; returns what `is_last` says then."""
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
        number = self._next_number
        self._next_number += self._process.count
        image_emb = encoded.image_emb.reshape(len(encoded.notes), self._dim)
        manifest = {
            "unit": _unit(shard),
            "identity": identity,
            "entries": count,
            "is_last": is_last(),
            "dropped": encoded.dropped,
            "states": [],
            **own,
        }
        write_part(self._folder, number, quantize(image_emb, self._dtype), encoded.notes, manifest)
        self._manifests[number] = manifest
        return manifest["is_last"]


def _unit(shard: SourceShard) -> str:
    return f"{shard.kind}:{shard.path}[{shard.start}:{shard.stop}]{json.dumps(dict(shard.options))}"


def _file_state(path: str) -> str:
    status = files.stat(path)
    return f"{status.st_size} {status.st_mtime_ns}"
