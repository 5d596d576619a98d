"""Creates an index of pictures, and updates it to match its source."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diht_jax.evaluation.embedding.encoding import Batching, Encoder
from diht_jax.evaluation.embedding.entries import Entry, Processes
from diht_jax.evaluation.embedding.files import check_settings
from diht_jax.evaluation.embedding.inputs import (
    PICTURES,
    ShardParts,
    counted,
    entries_bar,
    make_parts,
    shares_of,
)
from diht_jax.evaluation.embedding.picture_index import (
    LAYOUT,
    Part,
    find_leftovers,
    make_rows,
    make_thumbnail,
    quantize,
    read_manifests,
    write_part,
)
from diht_jax.readers import image_folder, registry
from diht_jax.readers.base import SourceShard
from diht_jax.records.schema import Pair
from diht_jax.storage import files
from diht_jax.storage.locks import lock_folder
from diht_jax.storage.stores import is_remote

# Pictures per part; an interruption can lose this many.
PART_ROWS = 10_000


class Update(NamedTuple):
    """Result of `update_index`."""

    added: int  # pictures that were embedded
    removed: int  # pictures that were removed from the index
    kept: int  # pictures that did not change
    dropped: dict[str, int]  # reason -> skipped entries, in this update and before


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
    """Creates the index of a source, or updates it.

    For a folder, added and changed pictures are embedded; for any other source the unit of change
    is a shard. Pictures that the source no longer has are removed from the index. An interrupted
    update loses the part in progress. All processes of a job must see the folder, and each embeds
    its share (`inputs.shares_of`).

    Args:
        model: a `LoadedModel`.
        shards: shards from `inputs.list_inputs`.
        folder: folder of the index; created if missing.
        dtype: of the stored embeddings, "float16" or "int8".
        thumbnails: store thumbnails; those of a folder are made from its files when shown.

    Returns:
        Counts over all processes.

    Raises:
        ValueError: the index is of another model or dtype, or is being updated.
    """
    files.refuse_url(folder, "--index")
    folder, processes, removed = pathlib.Path(folder), processes or Processes(), 0
    # Class numbers are irrelevant here, and change when a class is inserted before others.
    shards = [
        dataclasses.replace(shard, options={**shard.options, "label": 0})
        if "label" in shard.options
        else shard
        for shard in shards
    ]
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
        removed = _remove_stale(
            folder, settings, {_unit(shard): _states(shard) for shard in shards}
        )
        for path in find_leftovers(folder, read_manifests(folder, settings).values()):
            path.unlink()

    with contextlib.ExitStack() as stack:
        processes.together(prepare if processes.index == 0 else lambda: None)
        # All processes must read before the first part is written.
        old = processes.together(lambda: read_manifests(folder, settings))
        first_new = max(old, default=-1) + 1
        numbers = itertools.count(first_new + processes.index, processes.count)
        write = functools.partial(
            _write_part, model, folder, settings, batching, thumbnails, numbers
        )
        shares = shares_of(shards, processes.index, processes.count)
        processes.together(lambda: _add_missing(shares, list(old.values()), write))
        manifests = read_manifests(folder, settings)
    pictures = {number: manifest["pictures"] for number, manifest in manifests.items()}
    added = sum(count for number, count in pictures.items() if number >= first_new)
    dropped = collections.Counter[str]()
    for manifest in manifests.values():
        dropped.update(manifest["dropped"])
    return Update(added, removed, sum(pictures.values()) - added, dict(dropped))


def _remove_stale(
    folder: pathlib.Path, settings: dict[str, Any], current: Mapping[str, Mapping[str, Any]]
) -> int:
    """Removes parts of shards, and pictures of folders, that are gone or changed; counts them."""
    count = 0
    for number, manifest in read_manifests(folder, settings).items():
        now = current.get(manifest["unit"], {})
        known = {key: state for key, state in manifest["states"] if now.get(key) == state}
        if len(known) == len(manifest["states"]):
            continue
        count += manifest["pictures"]
        rows = None
        if known:
            rows = Part(folder, manifest).rows
            rows = rows.filter(np.array([key in known for key in rows["key"].to_pylist()], bool))
        if not rows:
            (folder / f"{number:05d}.json").unlink()
            continue
        count -= len(rows)
        # Unreadable entries are retried with the new ones, and counted then.
        states = [[key, known[key]] for key in rows["key"].to_pylist()]
        write_part(folder, number, rows, manifest | {"states": states, "dropped": {}}, settings)
    return count


def _add_missing(
    shares: Sequence[ShardParts],
    manifests: Sequence[dict[str, Any]],
    write: Callable[..., dict[str, Any]],
) -> None:
    """Writes this process's missing parts; `write` is `_write_part`."""
    with entries_bar([share.shard for share in shares]) as bar:
        for share in shares:
            shard, states = share.shard, _states(share.shard)
            own = [manifest for manifest in manifests if manifest["unit"] == _unit(shard)]
            if shard.kind != PICTURES:
                find = {manifest["part"]: manifest for manifest in own}.get
                make = functools.partial(write, shard, list(states.items()))
                collections.deque(make_parts(share, PART_ROWS, find, make, bar), maxlen=0)
                continue
            known = {key for manifest in own for key, _ in manifest["states"]}
            # Pictures added after `states` was read are left for the next update.
            unknown = states.keys() - known
            new = [each for each in image_folder.list_pictures(shard.path) if each[1] in unknown]
            bar.update(len(known))
            size = max(1, min(PART_ROWS, -(-len(new) // share.step)))
            for first in range(share.first * size, len(new), share.step * size):
                chunk = new[first : first + size]
                entries = counted(image_folder.read_listed(shard.path, chunk), bar)
                chosen = [(key, states[key]) for _, key, _ in chunk]
                write(shard, chosen, first // size, entries, lambda: False)


def _write_part(
    model: Any,
    folder: pathlib.Path,
    settings: dict[str, Any],
    batching: Batching | None,
    thumbnails: bool,
    numbers: Iterator[int],
    shard: SourceShard,
    states: Sequence[tuple[str, Any]],
    part: int,
    entries: Iterator[Entry],
    is_last: Callable[[], bool],
) -> dict[str, Any]:
    """Embeds entries of a shard and writes them as a part; returns its manifest."""
    is_folder = shard.kind == PICTURES

    def describe(pair: Pair) -> tuple[str, str, bytes]:
        picture = make_thumbnail(pair.image) if thumbnails and not is_folder else b""
        return pair.key, pair.caption, picture

    encoded = Encoder(model, entries, batching).images(describe, allow_empty=True)
    notes = encoded.notes
    stored = quantize(encoded.image_emb.reshape(len(notes), model.embed_dim), settings["dtype"])
    manifest = {
        "unit": _unit(shard),
        "folder": os.path.abspath(shard.path) if is_folder else None,
        "part": part,
        "is_last": is_last(),
        "entries": len(notes) + sum(encoded.dropped.values()),
        "dropped": encoded.dropped,
        "states": list(states),
    }
    rows, pictures = make_rows(notes, stored), [picture for _, _, picture in notes]
    return write_part(folder, next(numbers), rows, manifest, settings, pictures)


def _unit(shard: SourceShard) -> str:
    # "photos/" equals "photos". A moved folder is another one, since pictures are read from it.
    path = shard.path if is_remote(shard.path) else os.path.abspath(shard.path)
    return f"{shard.kind}:{path}[{shard.start}:{shard.stop}]{json.dumps(dict(shard.options))}"


def _states(shard: SourceShard) -> dict[str, Any]:
    """Returns values that reveal a change of a shard or, for a folder, of each picture by its key.

    For a picture, size and modification time, or why it cannot be read; for a table, also the state
    of the pictures that it refers to.
    """
    if shard.kind != PICTURES:
        identity = shard.identity()
        linked = registry.describe_linked(shard) if registry.names_files(shard) else None
        return {"": identity if linked is None else [identity, linked]}
    states = {}
    for path, key, reason in image_folder.list_pictures(shard.path):
        if reason is None:
            try:
                status = files.stat(path)
            except FileNotFoundError:  # removed after it was listed
                continue
            reason = f"{status.st_size} {status.st_mtime_ns}"
        states[key] = reason
    return states
