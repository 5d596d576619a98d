"""Refuses, or removes on request, an output of another config, input or model.

Nothing that was made with other settings is replaced unless `--overwrite` asks for it.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from absl import logging

from data_prep.filtering.config import DECIDING_PACKAGES, upgrade_settings
from data_prep.filtering.resharding import remove_output
from data_prep.jobs import fingerprint, shards

SETTINGS = "settings.json"

_SHOWN = 4


def reject_or_remove_stale(
    tasks: Sequence[shards.ShardTask],
    folder: str,
    settings: dict[str, Any],
    versions: Mapping[str, str],
    *,
    overwrite: bool,
) -> bool:
    """Refuses what was made by another config or model or from another input, or removes it.

    Args:
        tasks: of this run.
        folder: of their outputs.
        settings: what the config means; kept in the folder, so that differences can be named.
        versions: of the installed packages, of `config.package_versions`.
        overwrite: remove it.

    Returns:
        Whether anything was removed.

    Raises:
        ValueError: something has changed, and `overwrite` is not set.
    """
    folder = pathlib.Path(folder)
    fingerprint.forget_linked()  # as an earlier run of this process saw them
    changed = []
    for task in tasks:
        stats = shards.read_stats(task)
        if stats is None:
            continue
        reason = shards.explain_change(task, stats) or _explain_versions(stats, versions)
        if reason is not None:
            changed.append((task.output, reason))
    names = {os.path.basename(task.output) for task in tasks}
    for path in sorted(folder.glob(f"*{shards.STATS_SUFFIX}")):
        name = path.name.removesuffix(shards.STATS_SUFFIX)
        if name not in names:
            changed.append((str(folder / name), "the input, which has fewer shards now"))
    if changed and not overwrite:
        raise ValueError(_describe(folder, changed, settings))
    for path, reason in changed:
        logging.warning("%s: made again, since this changed: %s", path, reason)
        remove_output(path)
    if _read_settings(folder) != json.loads(json.dumps(settings)):
        shards.write_json(folder / SETTINGS, settings)
    return bool(changed)


def _explain_versions(stats: Mapping[str, Any], versions: Mapping[str, str]) -> str | None:
    """The package that has changed and decides; None where none has, or none was recorded."""
    before = stats.get("counts", {}).get("versions", {})
    for name in DECIDING_PACKAGES:
        if name in before and name in versions and before[name] != versions[name]:
            return f"{name} ({before[name]}, now {versions[name]})"
    return None


def _describe(
    folder: pathlib.Path, changed: Sequence[tuple[str, str]], settings: dict[str, Any]
) -> str:
    reasons = list(dict.fromkeys(reason for _, reason in changed))
    text = f"'{folder}' holds {len(changed)} shards that were made before this changed: "
    text += "; ".join(reasons[:_SHOWN])
    if len(reasons) > _SHOWN:
        text += f"; and {len(reasons) - _SHOWN} more"
    differences = list(compare_settings(_read_settings(folder), json.loads(json.dumps(settings))))
    if differences:
        text += f". In the config: {', '.join(differences[:_SHOWN])}"
    return f"{text}. Choose another output, or make them again with --overwrite"


def _read_settings(folder: pathlib.Path) -> dict[str, Any]:
    try:
        return upgrade_settings(json.loads((folder / SETTINGS).read_bytes()))
    except (FileNotFoundError, ValueError):
        return {}


def compare_settings(
    before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
    """What differs, as "image.min_side 1 -> 2"."""
    if not before:
        return
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from compare_settings(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name} {old} -> {new}"
