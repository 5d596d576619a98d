"""Makes an index of pictures, and brings it up to date with its source."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from diht_jax.evaluation.embedding.encoding import Batching, encode_images
from diht_jax.evaluation.embedding.files import check_settings
from diht_jax.evaluation.embedding.inputs import (
    PICTURES,
    CountedEntries,
    ShardParts,
    entries_bar,
    make_parts,
    shares_of,
)
from diht_jax.evaluation.embedding.picture_index import (
    DTYPES,
    Part,
    PictureIndex,
    make_thumbnail,
    quantize,
    read_manifests,
    write_manifest,
    write_part,
)
from diht_jax.progress import ProgressBar
from diht_jax.readers import image_folder
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files
from diht_jax.storage.locks import lock_folder

# Pictures a part: what an interruption can cost.
PART_ROWS = 10_000


@dataclasses.dataclass(frozen=True)
class Update:
    """Result of `update_index`.

    Attributes:
        added: number of pictures that were embedded.
        removed: of pictures that left the index.
        kept: of the others.
        dropped: reason -> entries that were left out, in this update and before.
    """

    added: int
    removed: int
    kept: int
    dropped: dict[str, int]


@dataclasses.dataclass(frozen=True)
class IndexProcess:
    """One of the processes of a job that update an index together, on a folder all of them see.

    Attributes:
        index: of this process.
        count: of processes.
        together: calls a function in every process, and returns what it has returned in this one
            when all are through; where it has failed in one, it raises in all of them.
    """

    index: int = 0
    count: int = 1
    together: Callable[[Callable[[], Any]], Any] = lambda work: work()

    def first(self, work: Callable[[], object]) -> None:
        """Like `together`, but only the first process calls the function."""
        self.together(work if self.index == 0 else lambda: None)


def update_index(
    model: Any,
    shards: Sequence[SourceShard],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    batching: Batching | None = None,
    thumbnails: bool = True,
    process: IndexProcess | None = None,
) -> Update:
    """Makes the index of a source, or brings it up to date.

    Pictures that were added to a folder are embedded, and those that were changed again; of any
    other source a shard is the unit. What is no longer in the source leaves the index. An update
    that is interrupted loses the part that it was making.

    Args:
        model: a `LoadedModel`.
        shards: of `inputs.list_inputs`.
        folder: of the index; is made.
        dtype: of the stored embeddings, one of `DTYPES`.
        batching: the defaults where None.
        thumbnails: keep a small picture of each entry. Those of a folder of pictures are read
            from there instead.
        process: of a job; each embeds its share (`inputs.shares_of`).

    Returns:
        What all processes together did.

    Raises:
        ValueError: the folder holds the index of another model or dtype, or another process is
            updating it.
    """
    files.refuse_url(folder, "index")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)} for an index")
    folder, process = pathlib.Path(folder), process or IndexProcess()
    settings = {
        "index": 1,
        "model_sha256": model.fingerprint(),
        "image_size": model.image_size,
        "dtype": dtype,
    }
    process.first(lambda: check_settings(folder, settings))
    encode = functools.partial(encode_images, model, batching=batching, allow_empty=True)
    updater = _Updater(folder, dtype, model.embed_dim, encode, thumbnails)
    with contextlib.ExitStack() as stack:
        process.first(lambda: stack.enter_context(lock_folder(folder, "--index", ".lock")))
        process.first(lambda: updater.remove_stale(shards))
        # Read by all before the first part is made.
        process.together(lambda: updater.read(process.index, process.count))
        process.together(lambda: updater.add(shares_of(shards, process.index, process.count)))
        return updater.describe()


class _Updater:
    """One update of an index."""

    def __init__(
        self, folder: pathlib.Path, dtype: str, dim: int, encode: Any, thumbnails: bool
    ) -> None:
        self._folder, self._dtype, self._dim = folder, dtype, dim
        self._encode, self._thumbnails = encode, thumbnails
        self._manifests: dict[int, dict[str, Any]] = {}
        self._first_new = self._next_number = self._step = 0
        self._removed = 0

    def remove_stale(self, shards: Sequence[SourceShard]) -> None:
        """Removes what is gone or was changed: parts of shards, pictures of folders."""
        by_unit = {_unit(shard): shard for shard in shards}
        states = {unit: _states(s) for unit, s in by_unit.items() if s.kind == PICTURES}
        for number, manifest in read_manifests(self._folder).items():
            unit, part = manifest["unit"], Part(self._folder, number, manifest)
            if unit in states:
                known = {key for key, state in manifest["states"] if states[unit].get(key) == state}
                keys = part.rows["key"].to_pylist()
                removed = [row for row, key in enumerate(keys) if key not in known]
                is_gone = len(removed) == len(keys)
            else:
                shard = by_unit.get(unit)
                removed = list(range(len(part.rows)))
                is_gone = shard is None or shard.identity() != manifest["identity"]
            if is_gone or unit in states:
                self._removed += len(removed) - int(part.removed.sum())
            if is_gone:
                del part
                for suffix in ("json", "arrow", "npy"):  # what makes it a part goes first
                    (self._folder / f"{number:05d}.{suffix}").unlink(missing_ok=True)
            elif unit in states and removed != manifest["removed"]:
                write_manifest(self._folder, number, manifest | {"removed": removed})

    def read(self, index: int, count: int) -> None:
        """Reads the manifests; every process has numbers of its own for the parts that it makes."""
        self._manifests = read_manifests(self._folder)
        self._first_new = max(self._manifests, default=-1) + 1
        self._next_number, self._step = self._first_new + index, count

    def add(self, mine: Sequence[ShardParts]) -> None:
        """Makes this process's parts."""
        with entries_bar([share.shard for share in mine]) as bar:
            for share in mine:
                add = self._add_pictures if share.shard.kind == PICTURES else self._add_shard
                add(share, bar)

    def describe(self) -> Update:
        """Counts what was done by all processes."""
        manifests = read_manifests(self._folder)
        dropped: collections.Counter[str] = collections.Counter()
        for manifest in manifests.values():
            dropped.update(manifest["dropped"])
        rows = len(PictureIndex(self._folder)) if manifests else 0
        new = {number: found for number, found in manifests.items() if number >= self._first_new}
        added = sum(len(Part(self._folder, number, found).rows) for number, found in new.items())
        return Update(added, self._removed, rows - added, dict(dropped))

    def _parts_of(self, shard: SourceShard) -> list[dict[str, Any]]:
        unit = _unit(shard)
        return [manifest for manifest in self._manifests.values() if manifest["unit"] == unit]

    def _add_shard(self, share: ShardParts, bar: ProgressBar) -> None:
        """Adds this process's parts of a shard that are missing."""
        done = {manifest["part"]: manifest for manifest in self._parts_of(share.shard)}

        def make(part: int, entries: CountedEntries, is_last: Callable[[], bool]) -> dict[str, Any]:
            return self._add_part(share.shard, part, entries, is_last, [])

        for _ in make_parts(share, PART_ROWS, done.get, make, bar):
            pass

    def _add_pictures(self, share: ShardParts, bar: ProgressBar) -> None:
        """Adds this process's share of the pictures of a folder that are new or changed."""
        shard, states = share.shard, _states(share.shard)
        known = {
            key
            for manifest in self._parts_of(shard)
            for key, state in manifest["states"]
            if states.get(key) == state
        }
        listed = list(image_folder.list_pictures(shard.path))
        new = [entry for entry in listed if entry[1] not in known]
        bar.update(len(listed) - len(new))
        size = max(1, min(PART_ROWS, -(-len(new) // share.step)))
        for first in range(share.first * size, len(new), share.step * size):
            chunk = new[first : first + size]
            entries = CountedEntries(image_folder.read_listed(shard.path, chunk), bar)
            own = [(key, states[key]) for _, key, _ in chunk]
            self._add_part(shard, first // size, entries, lambda: True, own)

    def _add_part(
        self,
        shard: SourceShard,
        part: int,
        entries: CountedEntries,
        is_last: Callable[[], bool],
        states: Sequence[tuple[str, str]],
    ) -> dict[str, Any]:
        """Writes a part; returns its manifest."""
        keeps_thumbnails = self._thumbnails and shard.kind != PICTURES

        def describe(pair: Pair) -> tuple[str, str, bytes]:
            thumbnail = make_thumbnail(pair.image) if keeps_thumbnails else b""
            return pair.key, pair.caption, thumbnail

        encoded = self._encode(entries, describe)
        number, self._next_number = self._next_number, self._next_number + self._step
        image_emb = encoded.image_emb.reshape(len(encoded.notes), self._dim)
        manifest = {
            "unit": _unit(shard),
            "identity": shard.identity(),
            "part": part,
            "is_last": is_last(),
            "entries": entries.count,
            "dropped": encoded.dropped,
            "states": list(states),
            "removed": [],
        }
        write_part(self._folder, number, quantize(image_emb, self._dtype), encoded.notes, manifest)
        return manifest


def _unit(shard: SourceShard) -> str:
    return f"{shard.kind}:{shard.path}[{shard.start}:{shard.stop}]{json.dumps(dict(shard.options))}"


def _states(shard: SourceShard) -> dict[str, str]:
    """Size and time of change of each picture of a folder by its key, or why it cannot be read."""
    states = {}
    for path, key, reason in image_folder.list_pictures(shard.path):
        if reason is None:
            status = files.stat(path)
            reason = f"{status.st_size} {status.st_mtime_ns}"
        states[key] = reason
    return states
