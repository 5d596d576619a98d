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

# Pictures a part: what an interruption can cost.
PART_ROWS = 10_000


class Update(NamedTuple):
    """Result of `update_index`."""

    added: int  # number of pictures that were embedded
    removed: int  # of pictures that left the index
    kept: int  # of the others
    dropped: dict[str, int]  # reason -> entries that were left out, in this update and before


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
    that is interrupted loses the part that it was making. All processes of a job see the folder,
    and each embeds its share (`inputs.shares_of`).

    Args:
        model: a `LoadedModel`.
        shards: of `inputs.list_inputs`.
        folder: of the index; is made.
        dtype: of the stored embeddings, "float16" or "int8".
        thumbnails: keep a small picture of each entry; those of a folder are read from there.

    Returns:
        What all processes together did.

    Raises:
        ValueError: the folder has an index of another model or dtype, or is being updated.
    """
    files.refuse_url(folder, "--index")
    folder, processes, removed = pathlib.Path(folder), processes or Processes(), 0
    # Of no use here are the numbers of classes, which change where a class comes before them.
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
        # Read by all before the first part is made.
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
    """Removes what is gone or was changed: parts of shards, pictures of folders. Counts it."""
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
        # What could not be read is tried again with what is new, and counted then.
        states = [[key, known[key]] for key in rows["key"].to_pylist()]
        write_part(folder, number, rows, manifest | {"states": states, "dropped": {}}, settings)
    return count


def _add_missing(
    shares: Sequence[ShardParts],
    manifests: Sequence[dict[str, Any]],
    write: Callable[..., dict[str, Any]],
) -> None:
    """Makes this process's parts, except those that there are; `write` is `_write_part`."""
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
            # Pictures that came after `states` are for the next update.
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
    """Embeds entries of a shard, and writes the part of them; returns its manifest."""
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
    # "photos/" is the folder "photos", and one that was moved is another, whose pictures are there.
    path = shard.path if is_remote(shard.path) else os.path.abspath(shard.path)
    return f"{shard.kind}:{path}[{shard.start}:{shard.stop}]{json.dumps(dict(shard.options))}"


def _states(shard: SourceShard) -> dict[str, Any]:
    """What shows that a shard was changed, or each picture of a folder, by its key.

    Of a picture, size and time of change, or why it cannot be read; of a table, those that it names
    as well.
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
            except FileNotFoundError:  # removed since it was listed
                continue
            reason = f"{status.st_size} {status.st_mtime_ns}"
        states[key] = reason
    return states
