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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from diht_jax.evaluation.embedding.encoding import Batching, EncodedImages, encode_images
from diht_jax.evaluation.embedding.entries import Processes
from diht_jax.evaluation.embedding.files import check_settings
from diht_jax.evaluation.embedding.inputs import (
    PICTURES,
    PartEntries,
    ShardParts,
    ShardReader,
    entries_bar,
    make_parts,
    shares_of,
)
from diht_jax.evaluation.embedding.picture_index import (
    DTYPES,
    LAYOUT,
    Part,
    find_leftovers,
    make_rows,
    make_thumbnail,
    quantize,
    read_manifests,
    remove_part,
    write_part,
)
from diht_jax.readers import image_folder
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files
from diht_jax.storage.locks import lock_folder
from diht_jax.terminal import ProgressBar

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


def update_index(
    model: Any,
    shards: Sequence[SourceShard],
    folder: str | os.PathLike[str],
    *,
    dtype: str = "float16",
    batching: Batching | None = None,
    thumbnails: bool = True,
    processes: Processes | None = None,
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
        processes: of a job, on a folder that all of them see; each embeds its share
            (`inputs.shares_of`).

    Returns:
        What all processes together did.

    Raises:
        ValueError: the folder holds the index of another model or dtype, or another process is
            updating it.
    """
    files.refuse_url(folder, "index")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}: expected one of {', '.join(DTYPES)} for an index")
    folder, processes, removed = pathlib.Path(folder), processes or Processes(), 0
    settings = {
        "index": LAYOUT,
        "model_sha256": model.fingerprint(),
        "image_size": model.image_size,
        "dtype": dtype,
    }

    def prepare() -> None:
        nonlocal removed
        check_settings(folder, settings, what="an index", flag="--index")
        stack.enter_context(lock_folder(folder, "--index", ".lock"))
        removed = _remove_stale(folder, settings, shards)
        for path in find_leftovers(folder, read_manifests(folder, settings).values()):
            path.unlink()

    with contextlib.ExitStack() as stack:
        processes.together(prepare if processes.index == 0 else lambda: None)
        # Read by all before the first part is made.
        old = processes.together(lambda: read_manifests(folder, settings))
        encode = functools.partial(encode_images, model, batching=batching, allow_empty=True)
        first_new = max(old, default=-1) + 1
        numbers = itertools.count(first_new + processes.index, processes.count)
        updater = _Updater(folder, settings, model.embed_dim, encode, thumbnails, numbers)
        shares = shares_of(shards, processes.index, processes.count)
        processes.together(lambda: updater.add(shares, list(old.values())))
        manifests = read_manifests(folder, settings)
    dropped: collections.Counter[str] = collections.Counter()
    for manifest in manifests.values():
        dropped.update(manifest["dropped"])
    pictures = {number: manifest["pictures"] for number, manifest in manifests.items()}
    added = sum(count for number, count in pictures.items() if number >= first_new)
    return Update(added, removed, sum(pictures.values()) - added, dict(dropped))


def _remove_stale(
    folder: pathlib.Path, settings: dict[str, Any], shards: Sequence[SourceShard]
) -> int:
    """Removes what is gone or was changed: parts of shards, pictures of folders. Counts it."""
    by_unit = {_unit(shard): shard for shard in shards}
    states = {unit: _states(s) for unit, s in by_unit.items() if s.kind == PICTURES}
    count = 0
    for number, manifest in read_manifests(folder, settings).items():
        unit = manifest["unit"]
        if unit in states:
            known = [pair for pair in manifest["states"] if states[unit].get(pair[0]) == pair[1]]
            if known == manifest["states"]:
                continue
            count += manifest["pictures"]
            if not known:
                remove_part(folder, number)
                continue
            names, rows = {key for key, _ in known}, Part(folder, manifest).rows
            is_known = [key in names for key in rows["key"].to_pylist()]
            rows = rows.filter(np.array(is_known, bool))
            count -= len(rows)
            write_part(folder, number, rows, manifest | {"states": known}, settings)
        elif unit not in by_unit or by_unit[unit].identity() != manifest["identity"]:
            count += manifest["pictures"]
            remove_part(folder, number)
    return count


@dataclasses.dataclass(frozen=True)
class _Updater:
    """Adds to an index what it lacks; `numbers` are those of the parts to come."""

    folder: pathlib.Path
    settings: dict[str, Any]
    dim: int
    encode: Callable[..., EncodedImages]
    thumbnails: bool
    numbers: Iterator[int]

    def add(self, shares: Sequence[ShardParts], manifests: Sequence[dict[str, Any]]) -> None:
        """Makes this process's parts, except those that there are."""
        with entries_bar([share.shard for share in shares]) as bar:
            for share in shares:
                unit = _unit(share.shard)
                own = [manifest for manifest in manifests if manifest["unit"] == unit]
                if share.shard.kind == PICTURES:
                    self._add_pictures(share, own, bar)
                    continue
                find = {manifest["part"]: manifest for manifest in own}.get
                make = functools.partial(self._add_part, share.shard)
                collections.deque(make_parts(share, PART_ROWS, find, make, bar), maxlen=0)

    def _add_pictures(
        self, share: ShardParts, manifests: Sequence[dict[str, Any]], bar: ProgressBar
    ) -> None:
        """Adds this process's share of the pictures of a folder that are new or changed."""
        shard, states = share.shard, _states(share.shard)
        known = {key for manifest in manifests for key, _ in manifest["states"]}
        listed = list(image_folder.list_pictures(shard.path))
        new = [entry for entry in listed if entry[1] not in known]
        bar.update(len(listed) - len(new))
        size = max(1, min(PART_ROWS, -(-len(new) // share.step)))
        for first in range(share.first * size, len(new), share.step * size):
            chunk = new[first : first + size]
            entries = PartEntries(ShardReader(shard, chunk), size, bar)
            self._add_part(
                shard, first // size, entries, [(key, states[key]) for _, key, _ in chunk]
            )

    def _add_part(
        self,
        shard: SourceShard,
        part: int,
        entries: PartEntries,
        states: Sequence[tuple[str, str]] = (),
    ) -> dict[str, Any]:
        """Writes a part; returns its manifest."""
        keeps_thumbnails = self.thumbnails and shard.kind != PICTURES

        def describe(pair: Pair) -> tuple[str, str, bytes]:
            return pair.key, pair.caption, make_thumbnail(pair.image) if keeps_thumbnails else b""

        encoded = self.encode(entries, describe)
        image_emb = encoded.image_emb.reshape(len(encoded.notes), self.dim)
        manifest = {
            "unit": _unit(shard),
            "identity": shard.identity(),
            "part": part,
            "is_last": entries.is_last(),
            "entries": entries.count,
            "dropped": encoded.dropped,
            "states": list(states),
        }
        rows = make_rows(encoded.notes, quantize(image_emb, self.settings["dtype"]))
        return write_part(self.folder, next(self.numbers), rows, manifest, self.settings)


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
