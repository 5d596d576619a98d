"""A whole job: from pairs, or embeddings, to the table of duplicates and its report.

The folder of the output, on a local disk or in a store:

    scan/            of each unit of the input: keys, content hashes, embeddings, thumbnails
    settings.json, scanned.json     of which config and scans all the rest was made
    centroids.npz, clusters.npz, groups/    of the search, by which it goes on
    duplicates/      a row for each pair: key, kind, cluster, similarity, duplicate_of, kept_key
    dropped.arrow    what the filter looks up
    report.html, inputs.json, duplicates.json
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.duplicates import config as duplicates_config
from data_prep.duplicates import pictures, report, scan, search, table
from data_prep.duplicates.rows import forget_copies, open_rows
from data_prep.duplicates.scan import Unit, scan_unit
from data_prep.jobs import shards
from data_prep.jobs.crash_search import after_death
from data_prep.jobs.engine import engine_options, print_failures
from data_prep.jobs.failures import (
    Failures,
    Survey,
    is_unfinished,
    run_noting_failures,
    survey,
    with_output,
)
from data_prep.sources.list import check_output, shards_of_task
from diht_jax.storage import files
from diht_jax.storage.locks import leader_lock

SETTINGS, SCANNED = "settings.json", "scanned.json"
# What the later stages write, the last ones first.
_RESULTS = (table.SUMMARY, table.LOOKUP, report.PAGE, table.TABLE, search.GROUPS)
_CLUSTERS = (search.CLUSTERS, search.CENTROIDS)
# Settings that decide the clusters, or only what is found in them; others decide the scan.
_OF_CLUSTERS, _OF_RESULTS = ("exact", "clusters", "seed"), ("threshold", "keep", "verify")


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
        num_tasks: jobs, or processes, that share the scan.
        engine: one of `engine.ENGINES`.
        in_step: whether they are processes of `jax.distributed`, of which the first one searches
            while the others wait. Of an array each that finds all scanned searches, one at a time.

    Returns:
        Units and tasks that failed, with the reason, and whether the table was made without them.

    Raises:
        ValueError: nothing to read, nowhere to write, or a folder of another input.
    """
    inputs = scan.find_inputs(config)
    folder = check_output(
        config.output, [] if config.input is None else [found.shard for found in inputs]
    )
    units = scan.plan_units(config, inputs, folder)
    for where in (folder, files.join(folder, scan.FOLDER)):
        files.make_folder(where)
    options = engine_options(config, engine)
    is_searching, known = not in_step or task_index == 0, {}
    if is_searching:
        with leader_lock(folder):
            _settle(config, folder)
            known = scan.reject_or_remove_stale(units, folder, config.max_changed_shards)
    _wait_for_others(in_step)
    failures = _scan(config, shards_of_task(units, task_index, num_tasks), folder, options)
    _wait_for_others(in_step)
    found = survey(units, known)
    if is_unfinished(config.max_failed_shards, found, len(units), "scanned"):
        others = found.failed if in_step else ()
        failures |= {unit["source"]: unit["error"] for unit in others}
        return Failures(print_failures(failures))
    not_found: dict[str, str] = {}
    if is_searching:
        with leader_lock(folder):
            not_found = _search(config, units, folder, options)
    _wait_for_others(in_step)
    summary = table.read_summary(folder)
    if summary is None:
        reason = {folder: "the first process has failed; see its messages"}
        return Failures(print_failures(not_found or reason))
    forget_copies(folder)
    if is_searching:
        print(report.describe(summary))
        print(f"look at {files.join(folder, report.PAGE)}")
    return print_failures(with_output(failures, found.failed))


def _wait_for_others(in_step: bool) -> None:
    """Waits for the other processes of `jax.distributed`."""
    if in_step:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("data_prep.duplicates")


def _scan(
    config: ml_collections.ConfigDict,
    mine: Sequence[Unit],
    folder: str,
    options: Mapping[str, Any],
) -> Failures:
    where = files.join(folder, scan.FOLDER)
    present = set(files.list_names(where, lambda name: name.endswith(shards.STATS_SUFFIX)))
    pending = [unit for unit in mine if os.path.basename(unit.stats_path) not in present]
    logging.info("%d units, %d of them done before", len(mine), len(mine) - len(pending))
    shards.remove_temporary_files(where, [os.path.basename(unit.output) for unit in mine])
    function = functools.partial(scan_unit, config=config)
    options = dict(options) | {"label": "scan", "after_death": after_death}
    return run_noting_failures(function, pending, options)


def _search(
    config: ml_collections.ConfigDict,
    units: Sequence[Unit],
    folder: str,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """Finds the duplicates, unless that is done, and writes all that is about all pairs.

    Returns:
        Tasks that failed, with the reason.
    """
    found = survey(units)  # another job may have scanned more meanwhile
    _settle_scanned(found, folder)
    if table.read_summary(folder) is not None:
        return {}
    counts = [stats["output"]["records"] for _, stats in found.parts]
    if not sum(counts):
        raise ValueError(f"config.input='{config.input}': no pairs")
    rows = open_rows(folder, [unit.output for unit, _ in found.parts], counts)
    options = dict(options) | {"timeout_secs": None}  # that is of a scan
    copies, clusters, failures = search.find_duplicates(rows, config, options)
    if failures:
        return failures
    exact, near = ((copies.kind == kind).sum() for kind in range(2))
    least = config.verify.correlation
    sizes = clusters.sizes()
    summary = {
        "units": len(found.parts) + len(found.failed),
        "pairs": len(rows),
        "exact": int(exact),
        "near": int(near),
        "kept": len(rows) - int(exact + near),
        "without_embedding": len(rows) - len(clusters.rows) - int(exact),
        "clusters": len(sizes),
        "threshold": config.threshold if least is None else least,
        "verified": least is not None,
        "keep": config.keep,
        **table.write_tables(rows, copies, clusters),
    }
    if found.failed:
        summary["failed"] = found.failed
    sources = [unit.source for unit, _ in found.parts]
    report.write_page(summary, copies, sizes[sizes > 0], rows, sources, config)
    if config.input is not None:
        table.write_inputs(folder, sources)
    table.write_summary(folder, summary)
    return {}


def _settle(config: ml_collections.ConfigDict, folder: str) -> None:
    """Removes of the folder what other settings have decided.

    Raises:
        ValueError: its scan has other settings.
    """
    settings = json.loads(json.dumps(_describe(config)))
    path = files.join(folder, SETTINGS)
    before = files.read_object(path)
    if before is not None:
        changed = {key for key in settings if before.get(key) != settings[key]}
        refused = sorted(changed.difference(_OF_CLUSTERS, _OF_RESULTS))
        if refused:
            raise ValueError(
                f"'{folder}' holds duplicates of other settings; changed: {', '.join(refused)}. "
                "Choose another config.output, or delete the folder"
            )
        if changed:
            _remove_stages(folder, with_clusters=not changed.isdisjoint(_OF_CLUSTERS))
    if before != settings:
        files.write_object(path, settings)


def _describe(config: ml_collections.ConfigDict) -> dict[str, Any]:
    settings = duplicates_config.record_settings(config)
    # How many rows are on the devices at a time does not decide.
    settings["clusters"].pop("chunk_rows")
    if config.embeddings.kind == "descriptor":
        settings["descriptor"] = pictures.DESCRIPTOR_VERSION
    elif config.verify.correlation is not None:
        settings["thumbnails"] = True
    return settings


def _settle_scanned(found: Survey, folder: str) -> None:
    """Records which scans the search is made of, and removes what was found in others."""
    path = files.join(folder, SCANNED)
    before = files.read_object(path) or {}
    now = {"units": scan.list_scans(found.parts)}
    summary = table.read_summary(folder)
    if before != now:
        _remove_stages(folder, with_clusters=True)
        files.write_object(path, now)
    elif summary is not None and summary.get("failed", []) != found.failed:
        files.remove(files.join(folder, table.SUMMARY))  # it is described again


def _remove_stages(folder: str, *, with_clusters: bool) -> None:
    """Removes what the search has written, the last stage first."""
    for name in (*_RESULTS, *(_CLUSTERS if with_clusters else ())):
        path = files.join(folder, name)
        if name in (table.TABLE, search.GROUPS):
            for part in files.list_names(path):
                files.remove(files.join(path, part))
        else:
            files.remove(path)
