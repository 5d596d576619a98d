"""The units that are scanned: one for each shard of the input, or for each file of embeddings.

As the parts of the filter they are named by a hash of their input's path below its root, and what
the input was lies beside the scan: one that is added, removed or replaced costs itself.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.duplicates import given
from data_prep.jobs import fingerprint, shards
from data_prep.jobs.failures import allowed_number
from data_prep.jobs.manifest import Input, hash_inputs
from data_prep.jobs.shards import ShardTask
from data_prep.sources.list import find_root, list_inputs
from diht_jax.readers.base import SourceShard
from diht_jax.storage import files

EMBEDDED = "embeddings"  # kind of a source that is a file of keys and vectors
FOLDER = "scan"

_ROWS = ".arrow"
_OURS = re.compile(rf"[0-9a-f]{{16}}{re.escape(_ROWS)}(\..+)?")
_SHOWN = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Unit(ShardTask):
    """What is scanned: a shard of pairs, or a file of embeddings.

    Attributes:
        embeddings: files with the embeddings of the shard's pairs.
    """

    embeddings: tuple[str, ...] = ()


def find_inputs(config: ml_collections.ConfigDict) -> Sequence[Input]:
    """The shards of `config.input`, or the files of embeddings where there is none.

    Raises:
        ValueError: there are none.
    """
    if config.input is not None:
        return list_inputs(config.input, config.source)
    pattern = config.embeddings.files
    paths = given.find_files(pattern)
    if not paths:
        raise ValueError(
            f"config.embeddings.files='{pattern}': no such file; expected .npz or .parquet files"
        )
    return [Input(SourceShard(EMBEDDED, path), find_root(pattern)) for path in paths]


def plan_units(
    config: ml_collections.ConfigDict, inputs: Sequence[Input], folder: str
) -> list[Unit]:
    """The unit of every input.

    Args:
        config: of `duplicates.config.default_config`.
        inputs: of `find_inputs`.
        folder: of the output.

    Raises:
        ValueError: the given embeddings are of other shards.
    """
    files_of: Sequence[tuple[str, ...]] = [()] * len(inputs)
    if config.input is not None and config.embeddings.kind == "files":
        files_of = _find_embeddings(config, [found.shard for found in inputs])
    return [
        Unit(
            found.shard,
            files.join(folder, FOLDER, name + _ROWS),
            shards.hash_config({"given": list(map(_identify, embeddings))}),
            config.input_identity,
            embeddings=embeddings,
        )
        for found, name, embeddings in zip(inputs, hash_inputs(inputs), files_of, strict=True)
    ]


def _identify(path: str) -> dict[str, Any]:
    return SourceShard(EMBEDDED, path).identity()


def _find_embeddings(
    config: ml_collections.ConfigDict, sources: Sequence[SourceShard]
) -> list[tuple[str, ...]]:
    """The files of `diht_jax.embed` of each shard; it may have embedded more shards."""
    folder = config.embeddings.files
    try:
        listed = given.list_shards(folder)
    except ValueError as error:
        raise ValueError(f"config.embeddings.files={error}") from error
    files_of = given.files_of_shards(folder, len(listed))
    known = dict(zip(listed, files_of, strict=True))
    identities = (source.identity() for source in sources)
    found = [known.get((identity["path"], identity["start"]), ()) for identity in identities]
    if not all(found):
        raise ValueError(
            f"config.embeddings.files='{folder}' is of another input than "
            f"config.input='{config.input}', or not complete; run diht_jax.embed on this input"
        )
    return found


def reject_or_remove_stale(
    units: Sequence[Unit], folder: str, max_changed: float
) -> dict[str, Mapping[str, Any]]:
    """Removes the scans of inputs that are gone or were replaced, while they are few.

    Args:
        units: of all jobs.
        folder: of the output.
        max_changed: `config.max_changed_shards`.

    Returns:
        Output of each unit that is scanned -> what is held of its statistics.

    Raises:
        ValueError: they are more than `max_changed` allows.
    """
    fingerprint.forget_linked()  # as an earlier run of this process saw them
    where = files.join(folder, FOLDER)
    present = files.list_names(where, lambda name: _OURS.fullmatch(name) is not None)
    scanned = {n.removesuffix(shards.STATS_SUFFIX) for n in present if _is_stats(n)}
    own = {os.path.basename(unit.output) for unit in units}
    gone = sorted(scanned - own)
    there = [unit for unit in units if os.path.basename(unit.output) in scanned]
    done, changed = {}, []
    for unit, stats, change in shards.check_all(there):
        if stats is not None and change is None:
            done[unit.output] = unit, shards.trim_stats(stats)
        elif stats is not None:
            changed.append(unit)
    allowed = allowed_number(max_changed, len(scanned))
    if len(gone) + len(changed) > allowed:
        raise ValueError(_describe_changes(where, gone, changed, max_changed, allowed))
    for unit in changed:
        logging.warning("%s: scanned again, since it or its embeddings changed", unit.source)
    for path in shards.damaged_outputs(list(done.values())):
        changed.append(done.pop(path)[0])
    for unit in changed:
        files.remove(unit.stats_path)
    below = set(shards.names_below(present, own))
    # The statistics first: without them a unit is not scanned.
    for name in sorted(set(present) - below, key=lambda name: not _is_stats(name)):
        files.remove(files.join(where, name))
    if gone:
        logging.warning("%s: %d scans of inputs that are gone are removed", where, len(gone))
    return {path: stats for path, (_, stats) in done.items()}


def _is_stats(name: str) -> bool:
    return name.endswith(shards.STATS_SUFFIX)


def _describe_changes(
    folder: str, gone: Sequence[str], changed: Sequence[Unit], max_changed: float, allowed: int
) -> str:
    paths = [
        fingerprint.read_location(files.join(folder, name + fingerprint.LOCATION_SUFFIX))
        for name in gone[:_SHOWN]
    ]
    names = [found["path"] for found in paths if found] + [str(unit.source) for unit in changed]
    count = len(gone) + len(changed)
    return (
        f"'{folder}' holds {len(gone)} scans of inputs that config.input or "
        f"config.embeddings.files no longer names, and {len(changed)} of inputs that were "
        f"replaced, such as {', '.join(names[:_SHOWN])}; config.max_changed_shards="
        f"{max_changed:g} allows {allowed} together. Choose another config.output, or have them "
        f"removed or scanned again with --config.max_changed_shards={count}"
    )


def list_scans(parts: Sequence[tuple[ShardTask, Mapping[str, Any]]]) -> list[list[str]]:
    """Name and hash of the scan of each unit, in order: what the search is made of."""
    return [[os.path.basename(unit.output), stats["output"]["digest"]] for unit, stats in parts]
