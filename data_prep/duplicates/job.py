"""A whole job: from pairs, or embeddings, to the table of duplicates and its report.

The folder of the output, on a local disk or in a store:

    scan/            of each unit of the input: keys, content hashes, embeddings, thumbnails
    scanned.json     of which scans all the rest was made
    centroids.npz    of the clusters
    exact/, rows/, clusters/, groups/, partial/, found/, named/, described/, keys/    of the stages
    duplicates/      a row for each pair: key, kind, cluster, similarity, duplicate_of, kept_key
    dropped.arrow    what the filter looks up
    report.html, inputs.json, duplicates.json
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import block_table, descriptor, mapped, report, stages, units
from data_prep.duplicates import config as duplicates_config
from data_prep.duplicates.scan import scan_unit
from data_prep.duplicates.search import Processes, Search, StageFailedError
from data_prep.duplicates.table import (
    LOOKUP,
    SUMMARY,
    read_summary,
    write_inputs,
    write_lookup,
    write_summary,
)
from data_prep.duplicates.units import Unit
from data_prep.jobs import crash_search, shards
from data_prep.jobs.engine import RaySettings, print_failures
from data_prep.jobs.failures import (
    Failures,
    Survey,
    allowed_number,
    is_unfinished,
    run_noting_failures,
    survey,
    with_output,
)
from data_prep.jobs.shards import STATS_SUFFIX
from data_prep.sources.list import check_output, shards_of_task
from diht_jax.storage import files, locks
from diht_jax.storage.stores import is_remote

SETTINGS, SCANNED = "settings.json", "scanned.json"
_LATE = "it was scanned after the search had begun; run the command again"
# What a stage is decided by, and what goes when that changes; later stages go with it.
_LATER = (
    (("exact",), (stages.EXACT, stages.ROWS)),
    (("clusters", "seed"), (stages.CENTROIDS, stages.CLUSTERS)),
    (
        ("threshold", "keep", "verify"),
        (
            *(stages.GROUPS, stages.PARTIAL, stages.FOUND, *block_table.STAGES),
            *(report.PAGE, LOOKUP, SUMMARY),
        ),
    ),
)


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
    in_step: bool = False,
) -> Failures:
    """Does what is not done yet.

    Args:
        config: a valid one of `duplicates.config.default_config`.
        task_index: number of this job of a job array, or of this process of `jax.distributed`.
        num_tasks: jobs, or processes, that share the work.
        engine: one of `engine.ENGINES`.
        in_step: whether they are processes of `jax.distributed`: k-means runs on the devices of
            all, and all go through the stages together. Jobs of an array do not wait for one
            another: once all is scanned, each that comes takes part.

    Returns:
        Units and tasks that failed, with the reason, and whether the table was made without them.

    Raises:
        ValueError: nothing to read, nowhere to write, or a folder of another input.
    """
    inputs = units.find_inputs(config)
    sources = [] if config.input is None else [found.shard for found in inputs]
    folder = check_output(config.output, sources)
    planned = units.plan_units(config, inputs, folder)
    for where in (folder, files.join(folder, units.FOLDER)):
        files.make_folder(where)
    options = {
        "num_workers": config.num_workers,
        "retries": config.retries,
        "ray": RaySettings(**config.ray.to_dict()) if engine == "ray" else None,
    }
    processes = Processes(task_index, num_tasks, in_step, options)
    failures = Failures()
    try:
        known = _prepare(config, planned, folder, processes)
        mine = shards_of_task(planned, task_index, num_tasks)
        failures = _scan(config, mine, folder, options)
        processes.agree({})
        found = survey(planned, known)
        if is_unfinished(config.max_failed_shards, found, len(planned), "scanned"):
            others = found.failed if in_step else ()
            failures |= {unit["source"]: unit["error"] for unit in others}
            return Failures(print_failures(failures))
        found = _choose_units(config, planned, found, folder, processes)
        _find(config, found, folder, processes)
    except StageFailedError as error:
        return Failures(print_failures(error.failures))
    summary = read_summary(folder)
    if summary is None:  # another job writes it
        return Failures()
    mapped.forget(mapped.cache_folder(folder))
    if processes.writes:
        print(report.describe(summary))
        print(f"look at {files.join(folder, report.PAGE)}")
    return print_failures(with_output(failures, found.failed))


def _prepare(
    config: ml_collections.ConfigDict, planned: Sequence[Unit], folder: str, processes: Processes
) -> Mapping[str, Any]:
    """Settles what the folder holds.

    Returns:
        Output -> statistics of units that are scanned, of those that were looked at.
    """
    problems: dict[str, str] = {}
    known: Mapping[str, Any] = {}
    refusal = None
    if processes.writes:
        with locks.leader_lock(folder):
            try:
                _settle(config, folder)
                known = units.reject_or_remove_stale(planned, folder, config.max_changed_shards)
            except ValueError as error:
                refusal, problems = error, {folder: str(error)}
    if processes.in_step:
        with contextlib.suppress(*([StageFailedError] if refusal else [])):
            processes.agree(problems)
    if refusal is not None:
        raise refusal
    return known


def _scan(
    config: ml_collections.ConfigDict,
    mine: Sequence[Unit],
    folder: str,
    options: Mapping[str, Any],
) -> Failures:
    where = files.join(folder, units.FOLDER)
    present = set(files.list_names(where, lambda name: name.endswith(STATS_SUFFIX)))
    pending = [unit for unit in mine if os.path.basename(unit.stats_path) not in present]
    logging.info("%d units, %d of them done before", len(mine), len(mine) - len(pending))
    shards.remove_temporary_files(where, [os.path.basename(unit.output) for unit in mine])
    function = functools.partial(scan_unit, config=config)
    scanning = {"label": "scan", "timeout_secs": config.shard_timeout_secs}
    scanning["after_death"] = crash_search.after_death
    return run_noting_failures(function, pending, dict(options) | scanning)


def _find(
    config: ml_collections.ConfigDict, found: Survey, folder: str, processes: Processes
) -> None:
    """Finds the duplicates in the units that are scanned, unless that is done."""
    if read_summary(folder) is not None:
        return
    rows = [stats["output"]["records"] for _, stats in found.parts]
    starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
    if not starts[-1]:
        raise ValueError(f"config.input='{config.input}': no pairs")
    search = Search(config, folder, tuple(unit for unit, _ in found.parts), starts)
    stages.find_all(search, processes)
    buckets = block_table.write_all(search, processes)
    if processes.writes:
        with locks.leader_lock(folder):
            if read_summary(folder) is None:
                _describe_all(search, buckets, found)
    processes.agree({})


def _describe_all(search: Search, buckets: int, found: Survey) -> None:
    """Writes what is about all pairs: the table for the filter, the report and the summary."""
    config, folder = search.config, search.folder
    sizes = stages.cluster_sizes(search)
    facts = block_table.read_facts(search)
    exact, near = (sum(block[kind] for block in facts) for kind in ("exact", "near"))
    least = config.verify.correlation
    summary = {
        "units": len(found.parts) + len(found.failed),
        "pairs": len(search.rows),
        "exact": exact,
        "near": near,
        "kept": len(search.rows) - exact - near,
        "without_embedding": sum(block["without_cluster"] for block in facts) - exact,
        "clusters": int(np.flatnonzero(sizes).max(initial=-1)) + 1,
        "pairs_of_repeated_keys": block_table.count_repeated(search, buckets),
        "threshold": config.threshold if least is None else least,
        "verified": least is not None,
        "keep": config.keep,
        "digest": write_lookup(folder, block_table.read_keys(search, buckets)),
    }
    if found.failed:
        summary["failed"] = found.failed
    shown = [block["report"] for block in facts]
    page = report.render(summary, shown, sizes[sizes > 0], search.rows, config)
    files.write_bytes(files.join(folder, report.PAGE), page.encode("utf-8", "replace"))
    if config.input is not None:
        write_inputs(folder, (unit.source for unit in search.units))
    write_summary(folder, summary)


def _settle(config: ml_collections.ConfigDict, folder: str) -> None:
    """Removes of the folder what other settings have decided.

    Raises:
        ValueError: its scan has other settings, or is of an older version.
    """
    settings = json.loads(json.dumps(_describe(config)))
    path = files.join(folder, SETTINGS)
    before = files.read_object(path)
    if before is not None:
        if "units" in before:
            raise ValueError(
                f"'{folder}' was made by an older version, which numbered its scans: the filter "
                "goes on reading its table. Choose another config.output, or delete the folder"
            )
        later = {key for keys, _ in _LATER for key in keys}
        changed = sorted(k for k in settings if before.get(k) != settings[k])
        refused = [key for key in changed if key not in later]
        if refused:
            raise ValueError(
                f"'{folder}' holds duplicates of other settings; changed: {', '.join(refused)}. "
                "Choose another config.output, or delete the folder"
            )
        if changed:
            _remove_stages(folder, min(i for i, (k, _) in enumerate(_LATER) if {*k} & {*changed}))
    if before != settings:
        files.write_bytes(path, (json.dumps(settings, indent=1) + "\n").encode())


def _describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
    settings = duplicates_config.record_settings(config)
    # How many rows lie on the devices does not decide.
    settings["clusters"].pop("chunk_rows")
    if config.embeddings.kind == "descriptor":
        settings["descriptor"] = descriptor.VERSION
    elif config.verify.correlation is not None:
        settings["thumbnails"] = True
    return settings


def _choose_units(
    config: ml_collections.ConfigDict,
    planned: Sequence[Unit],
    found: Survey,
    folder: str,
    processes: Processes,
) -> Survey:
    """The units that the search is made of; the others count as failed."""
    if processes.writes:
        with locks.leader_lock(folder):
            # Another job may have scanned more before this one had the lock.
            found = survey(planned, {unit.output: stats for unit, stats in found.parts})
            _settle_scanned(config, planned, found, folder)
    if processes.in_step:
        processes.agree({})
    chosen = {name for name, _ in _read_scanned(folder)}
    parts, failed = [], list(found.failed)
    for unit, stats in found.parts:
        if os.path.basename(unit.output) in chosen:
            parts.append((unit, stats))
        else:
            failed.append({"source": str(unit.source), "error": _LATE})
    return found._replace(parts=parts, failed=failed)


def _settle_scanned(
    config: ml_collections.ConfigDict, planned: Sequence[Unit], found: Survey, folder: str
) -> None:
    """Records which scans the search is made of, and removes what was found in others.

    Where a search of fewer units has begun, within `config.max_failed_shards`, it is finished
    first, since other jobs may be at it.
    """
    before, now = _read_scanned(folder), units.list_scans(found.parts)
    summary = read_summary(folder)
    if before and before != now and summary is None:
        known = set(map(tuple, before))
        if [row for row in now if tuple(row) in known] == before:
            allowed = allowed_number(config.max_failed_shards, len(planned))
            if len(planned) - len(before) <= allowed:
                logging.warning("%d units are left to the next run", len(now) - len(before))
                return
    if before != now:
        _remove_stages(folder, 0)
        text = json.dumps({"units": now}, indent=1) + "\n"
        files.write_bytes(files.join(folder, SCANNED), text.encode())
    elif summary is not None and summary.get("failed", []) != found.failed:
        files.remove(files.join(folder, SUMMARY))  # it is described again


def _read_scanned(folder: str) -> list[list[str]]:
    return (files.read_object(files.join(folder, SCANNED)) or {}).get("units", [])


def _remove_stages(folder: str, first: int) -> None:
    """Removes what the stages from one of `_LATER` on have written, the last ones first."""
    for name in reversed([name for _, names in _LATER[first:] for name in names]):
        _remove(files.join(folder, name))


def _remove(path: str) -> None:
    """Removes a file, and the files of a folder."""
    for name in files.list_names(path):
        files.remove(files.join(path, name))
    if is_remote(path) or not os.path.isdir(path):
        files.remove(path)
