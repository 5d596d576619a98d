"""Duplicate search as a complete job: from pairs or embeddings to the table and the report.

The output folder, on a local disk or in a store, contains:

    scan/            keys, content hashes, embeddings and thumbnails of each unit of the input
    settings.json    settings of the scan
    centroids.npz, clusters.npz, groups/    state of the search, from which it resumes
    duplicates/      a row for each pair: key, kind, cluster, similarity, duplicate_of,
                     other_caption, kept_key
    dropped.arrow    lookup table for the filter
    report.html, duplicates.json
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.duplicates import scan, search, table
from data_prep.duplicates.pictures import DESCRIPTOR_VERSION
from data_prep.duplicates.rows import CAPTION, NONE, Rows, check_columns, forget_copies, open_rows
from data_prep.duplicates.scan import Unit, scan_unit
from data_prep.jobs import shards
from data_prep.jobs.engine import print_failures
from data_prep.jobs.failures import (
    Failures,
    Survey,
    is_unfinished,
    run_noting_failures,
    survey,
    with_output,
)
from data_prep.sources import check_folder, check_not_input
from diht_jax.storage import files
from diht_jax.storage.locks import leader_lock
from diht_jax.terminal import print_escaped

SETTINGS = "settings.json"

_REMOVED = "its scan was removed while the command ran; run it again"


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
) -> Failures:
    """Runs all unfinished stages.

    The jobs of an array share the scan. Every job that finds it complete searches, one at a time.

    Returns:
        Failed units and tasks, with the reason, and whether the table was made without them.

    Raises:
        ValueError: there is no input, the output cannot be written, or it is of another input.
    """
    inputs = scan.find_inputs(config)
    folder = check_folder(config.output)
    if config.input is not None:
        check_not_input(folder, [found.shard for found in inputs])
    units = scan.plan_units(config, inputs, folder)
    files.make_folder(files.join(folder, scan.FOLDER))
    with leader_lock(folder):
        _check_settings(config, folder)
        known = scan.reject_or_remove_stale(units, folder, config.max_changed_shards)
    mine = units[task_index::num_tasks]
    failures = _scan(config, mine, folder, engine)
    found = survey(units, {**known, **failures.made})
    if is_unfinished(
        config.max_failed_shards, found, len(units), "scanned", has_other_jobs=num_tasks > 1
    ):
        reasons = found.explain_changed()
        own = {unit.output for unit in mine}
        reasons |= {str(u.source): _REMOVED for u in found.waiting if u.output in own}
        return Failures(print_failures(reasons | failures))
    with leader_lock(folder):
        # Another job may have scanned more in the meantime.
        known = {unit.output: stats for unit, stats in found.parts}
        not_found = _search(config, survey(units, known), folder, engine)
        summary = table.read_summary(folder)
        if summary is None:
            return Failures(print_failures(not_found))
        forget_copies(folder)  # within the lock: other jobs on this machine share the copies
    print_escaped(table.describe_summary(summary))
    print_escaped(f"look at {files.join(folder, table.PAGE)}")
    return print_failures(with_output(failures, found.failed))


def _check_settings(config: ml_collections.ConfigDict, folder: str) -> None:
    """Raises ValueError if the folder contains scans with other settings."""
    settings: dict[str, Any] = {name: config[name].to_dict() for name in ("source", "embeddings")}
    if config.embeddings.kind == "descriptor":
        settings["descriptor"] = DESCRIPTOR_VERSION
    elif config.verify.correlation is not None:
        settings["thumbnails"] = True
    settings = json.loads(json.dumps(settings))
    path = files.join(folder, SETTINGS)
    before = files.read_object(path)
    if before is None and files.exists(path):
        raise ValueError(f"'{path}' is damaged; choose another config.output, or delete the folder")
    changed = sorted(key for key in settings if before and before.get(key) != settings[key])
    if changed:
        raise ValueError(
            f"'{folder}' holds duplicates of other settings; changed: {', '.join(changed)}. "
            f"Choose another config.output, or delete the folder ({path} has the old settings)"
        )
    if before != settings:
        files.write_object(path, settings, with_checksum=True)


def _scan(
    config: ml_collections.ConfigDict,
    mine: Sequence[Unit],
    folder: str,
    engine: str,
) -> Failures:
    where = files.join(folder, scan.FOLDER)
    present = set(files.list_names(where, shards.STATS_SUFFIX))
    pending = [unit for unit in mine if os.path.basename(unit.stats_path) not in present]
    logging.info("%d units, %d of them done before", len(mine), len(mine) - len(pending))
    shards.remove_temporary_files(where, [os.path.basename(unit.output) for unit in mine])
    function = functools.partial(scan_unit, config=config)
    return run_noting_failures(function, pending, config, engine, label="scan")


def _search(
    config: ml_collections.ConfigDict, found: Survey, folder: str, engine: str
) -> dict[str, str]:
    """Finds the duplicates unless this is done, and writes the files about the whole data set.

    Returns:
        Failed tasks, with the reason.
    """
    scans = [
        [os.path.basename(unit.output), stats["output"]["digest"]] for unit, stats in found.parts
    ]
    values = config.to_dict()
    values["clusters"].pop("chunk_rows")  # does not affect the result
    settings = {name: values[name] for name in ("exact", "other_captions", "clusters", "seed")}
    of_clusters = shards.hash_config({"scans": scans, "settings": settings})
    settings |= {name: values[name] for name in ("threshold", "keep", "verify")}
    of_result = shards.hash_config({"scans": scans, "settings": settings})
    summary = table.read_summary(folder)
    if summary is not None:
        known = {"made_of": of_result, "report_pairs": config.report_pairs}
        is_same = known.items() <= summary.items() and summary.get("failed", []) == found.failed
        if is_same and table.is_whole(folder, summary):
            return {}
        files.remove(files.join(folder, table.SUMMARY))
    if damaged := _check_scans(found, folder):
        return damaged
    rows = open_rows(folder, [unit.output for unit, _ in found.parts])
    if not len(rows):
        raise ValueError(f"config.input='{config.input}': no pairs")
    inputs = {}
    if config.input is not None:  # hashed now, because they may disappear during the search
        inputs["inputs"] = sorted({table.hash_input(unit.source) for unit, _ in found.parts})
    keep = config.other_captions == "keep"
    is_exact = config.exact and config.input is not None
    exact = search.find_exact(rows, keep_captions=keep) if is_exact else NONE
    captions = rows.column(CAPTION)
    copies = search.join(exact, NONE, captions, keep_captions=keep).dropped()
    clusters = search.find_clusters(rows, copies.rows, config, of_clusters)
    near, failures = search.compare_clusters(rows, clusters, config, of_result, engine)
    if not failures:
        joined = search.join(exact, near, captions, keep_captions=keep)
        known = {"made_of": of_result, **inputs}
        _describe(config, found, rows, clusters, joined, known)
    return failures


def _check_scans(found: Survey, folder: str) -> dict[str, str]:
    """Returns units with a missing or damaged scan, with the reason; the next run rescans them."""
    failures = {str(unit.source): _REMOVED for unit in found.waiting}
    for unit, stats in found.parts:
        try:
            check_columns(unit.output, folder, stats["output"]["digest"])
        except ValueError as error:
            files.remove(unit.stats_path)
            where = f"{unit.output}: {error}, by {os.path.basename(unit.stats_path)}"
            failures[str(unit.source)] = f"{where}; run the command again"
    return failures


def _describe(
    config: ml_collections.ConfigDict,
    found: Survey,
    rows: Rows,
    clusters: search.Clusters,
    copies: search.Found,
    known: Mapping[str, Any],
) -> None:
    """Writes the tables, the report and the summary; `known` are entries of the summary."""
    exact, near, marked = np.bincount(copies.kind, minlength=3).tolist()
    least = config.verify.correlation
    sizes = clusters.sizes()
    summary = {
        "units": len(found.parts) + len(found.failed),
        "pairs": len(rows),
        "exact": exact,
        "near": near,
        "kept": len(rows) - exact - near,
        "kept_other_caption": marked,
        "without_embedding": len(rows) - len(clusters.rows) - exact,
        "clusters": len(sizes),
        "threshold": config.threshold if least is None else least,
        "verified": least is not None,
        "keep": config.keep,
        "report_pairs": config.report_pairs,
        **known,
        **table.write_tables(rows, copies, clusters),
    }
    if found.failed:
        summary["failed"] = found.failed
    sources = [unit.source for unit, _ in found.parts]
    table.write_page(summary, copies, sizes[sizes > 0], rows, sources, config)
    path = files.join(rows.output, table.SUMMARY)
    files.write_object(path, summary, with_checksum=True)
