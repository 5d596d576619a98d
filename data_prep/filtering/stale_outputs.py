"""Refuses, or removes on request, an output of another config, input or model.

Nothing that was made with other settings is replaced unless `--overwrite` asks for it. Parts of
inputs that are gone or were replaced follow them by themselves while they are few: an everyday
change costs itself, and a mistyped `config.input` costs nothing.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from absl import logging

from data_prep.filtering.config import DECIDING_PACKAGES, SETTINGS, compare_settings
from data_prep.filtering.resharding import remove_output
from data_prep.jobs import fingerprint, shards
from data_prep.jobs.failures import allowed_number
from data_prep.jobs.packed import PackedList
from diht_jax.storage import files

_SHOWN = 4


class Finished(NamedTuple):
    """What was done before.

    Attributes:
        stats: output of a task that is done -> what is held of its statistics.
        removed: whether anything was removed.
    """

    stats: dict[str, dict[str, Any]]
    removed: bool


def reject_or_remove_stale(
    tasks: Sequence[shards.ShardTask],
    all_tasks: Sequence[shards.ShardTask],
    folder: str,
    settings: dict[str, Any],
    versions: Mapping[str, str],
    *,
    overwrite: bool,
    max_changed: float,
) -> Finished:
    """Refuses what was made by another config or model or from another input, or removes it.

    The statistics of each task are read once. Those of other jobs are looked at only where this job
    alone has more changes than its share of what is allowed.

    Args:
        tasks: those of this job.
        all_tasks: those of all jobs of an array.
        folder: of the outputs.
        settings: what the config means; kept in the folder, so that differences can be named.
        versions: of the installed packages, of `config.package_versions`.
        overwrite: remove it.
        max_changed: `config.max_changed_shards`, how many inputs may be gone or replaced without
            that.

    Raises:
        ValueError: something else has changed, or more inputs, and `overwrite` is not set.
    """
    fingerprint.forget_linked()  # as an earlier run of this process saw them
    suffixes = (shards.STATS_SUFFIX, shards.FAILED_SUFFIX)
    present = set(files.list_names(folder, lambda name: name.endswith(suffixes)))
    there = PackedList(t for t in tasks if _stats_name(t) in present)
    changed, replaced, done = _compare(there, versions)
    names = {os.path.basename(task.output) for task in all_tasks} if present else set()
    finished = [n.removesuffix(shards.STATS_SUFFIX) for n in present if _is_shard_stats(n)]
    gone = sorted(name for name in finished if name not in names)
    allowed = allowed_number(max_changed, len(finished))
    spare = allowed - len(gone) - len(changed)
    is_everyday, elsewhere = replaced == len(changed) and spare >= 0, 0
    # Each job removes what has changed of its own: together they must stay within the limit.
    share = (allowed - len(gone)) * len(there) // max(len(finished), 1)
    if changed and is_everyday and not overwrite and len(changed) > share:
        own = {task.output for task in tasks}
        others = PackedList(
            t for t in all_tasks if t.output not in own and _stats_name(t) in present
        )
        elsewhere = _count_changed(others, spare + 1)
        is_everyday = elsewhere <= spare
    if (changed or gone) and not (overwrite or is_everyday):
        text = _describe(folder, changed, gone, settings, len(finished))
        if replaced or gone:
            text += (
                f"; config.max_changed_shards={max_changed:g} allows {allowed} inputs to be gone "
                "or replaced without it"
            )
        if elsewhere:
            text += f", and at least {elsewhere} of the other jobs of this array are replaced too"
        raise ValueError(text)
    removed = bool(changed or gone)
    for path, reason in changed:
        logging.warning("%s: made again, since this changed: %s", path, reason)
        remove_output(path)
    for name in gone:
        found = fingerprint.read_location(_location_path(folder, name)) or {"path": "its input"}
        logging.warning("%s: removed, since %s is gone", files.join(folder, name), found["path"])
        remove_output(files.join(folder, name))
    notes = [name for name in present if name.endswith(shards.FAILED_SUFFIX)]
    gone += {n.removesuffix(shards.FAILED_SUFFIX) for n in notes} - names - set(gone)
    if gone:
        for name in shards.names_below(files.list_names(folder), gone):  # lists, samples, notes
            files.remove(files.join(folder, name))
    if _read_settings(folder) != json.loads(json.dumps(settings)):
        shards.write_json(files.join(folder, SETTINGS), settings)
    return Finished(done, removed)


def _compare(
    tasks: Sequence[shards.ShardTask], versions: Mapping[str, str]
) -> tuple[list[tuple[str, str]], int, dict[str, dict[str, Any]]]:
    """Tasks that are done, as things are now.

    Returns:
        Output and reason of each that has changed; how many of them only by their input; the
        statistics of the others, by output.
    """
    changed, replaced, done = [], 0, {}
    for task, stats, reason in shards.check_all(tasks):
        if stats is None:
            continue
        other_version = _explain_versions(stats, versions)
        if reason is None and other_version is None:
            done[task.output] = shards.trim_stats(stats)
        else:
            changed.append((task.output, reason or other_version))
            replaced += other_version is None and stats.get("config_hash") == task.config_hash
    return changed, replaced, done


def _count_changed(tasks: Sequence[shards.ShardTask], limit: int) -> int:
    """How many finished tasks have changed; no more are looked at once `limit` of them have."""
    checked = shards.check_all(tasks)
    changed = (task for task, stats, reason in checked if stats is not None and reason is not None)
    return sum(1 for _ in itertools.islice(changed, limit))


def _stats_name(task: shards.ShardTask) -> str:
    return os.path.basename(task.stats_path)


def _is_shard_stats(name: str) -> bool:
    return name.endswith(shards.STATS_SUFFIX) and not name.startswith(".")


def _explain_versions(stats: Mapping[str, Any], versions: Mapping[str, str]) -> str | None:
    """The package that has changed and decides; None where none has, or none was recorded."""
    before = stats.get("counts", {}).get("versions", {})
    for name in DECIDING_PACKAGES:
        if name in before and name in versions and before[name] != versions[name]:
            return f"{name} ({before[name]}, now {versions[name]})"
    return None


def _describe(
    folder: str,
    changed: Sequence[tuple[str, str]],
    gone: Sequence[str],
    settings: dict[str, Any],
    finished: int,
) -> str:
    """What has changed, and what `--overwrite` would cost."""
    texts = []
    if changed:
        reasons = list(dict.fromkeys(reason for _, reason in changed))
        text = f"'{folder}' holds {len(changed)} shards that were made before this changed: "
        text += "; ".join(reasons[:_SHOWN])
        if len(reasons) > _SHOWN:
            text += f"; and {len(reasons) - _SHOWN} more"
        differences = list(
            compare_settings(_read_settings(folder), json.loads(json.dumps(settings)))
        )
        if differences:
            text += f". In the config: {', '.join(differences[:_SHOWN])}"
        texts.append(text)
    if gone:
        paths = [fingerprint.read_location(_location_path(folder, n)) for n in gone[:_SHOWN]]
        inputs = ", ".join(f"'{found['path']}'" for found in paths if found)
        texts.append(
            f"'{folder}' holds {len(gone)} shards whose inputs config.input no longer names"
            + (f", such as {inputs}" if inputs else "")
        )
    kept = finished - len(changed) - len(gone)
    return (
        f"{'. '.join(texts)}. Choose another output, or make it right with --overwrite: "
        f"{len(changed)} are made again, {len(gone)} removed, and {kept} stay"
    )


def _location_path(folder: str, name: str) -> str:
    return files.join(folder, name + fingerprint.LOCATION_SUFFIX)


def _read_settings(folder: str) -> dict[str, Any]:
    return files.read_object(files.join(folder, SETTINGS)) or {}
