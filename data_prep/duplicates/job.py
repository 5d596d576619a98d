"""A whole job: from pairs, or embeddings, to the table of duplicates and its report.

The folder of the output, on a local disk or in a store:

    scan/            of each unit of the input: keys, content hashes, embeddings, thumbnails
    centroids.npz    of the clusters
    exact/, rows/, clusters/, groups/, partial/, found/, named/, described/, keys/    of the stages
    duplicates/      a row for each pair: key, kind, cluster, similarity, duplicate_of, kept_key
    dropped.arrow    what the filter looks up
    report.html, duplicates.json
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

from data_prep.duplicates import block_table, descriptor, given, mapped, report, stages
from data_prep.duplicates import config as duplicates_config
from data_prep.duplicates.scan import ROWS, Rows, Unit, scan_unit
from data_prep.duplicates.search import Processes, Search, StageFailedError
from data_prep.duplicates.table import LOOKUP, SUMMARY, read_summary, write_lookup, write_summary
from data_prep.jobs import claim, files
from data_prep.jobs.engine import RaySettings, print_failures, run_pending
from data_prep.sources.list import check_output, list_sources, shards_of_task
from diht_jax.data.readers.base import SourceShard
from diht_jax.data.records.remote import file_size
from diht_jax.data.stores import is_remote

SETTINGS, SCAN = "settings.json", "scan"
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
) -> dict[str, str]:
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
        Units and tasks that failed, with the reason; nothing when the table is complete.

    Raises:
        ValueError: nothing to read, nowhere to write, or a folder of another input.
    """
    sources = [] if config.input is None else list_sources(config.input, config.source)
    folder = check_output(config.output, sources)
    units = _list_units(config, sources, folder)
    for where in (folder, files.join(folder, SCAN)):
        files.make_folder(where)
    options = {
        "num_workers": config.num_workers,
        "retries": config.retries,
        "ray": RaySettings(**config.ray.to_dict()) if engine == "ray" else None,
    }
    processes = Processes(task_index, num_tasks, in_step, options)
    try:
        if not _prepare(config, units, folder, processes):
            return {}
        if read_summary(folder) is None:
            failures = _scan(config, shards_of_task(units, task_index, num_tasks), folder, options)
            processes.agree(failures)
            if not _unscanned(units, folder):
                _find(config, units, folder, processes)
    except StageFailedError as error:
        return print_failures(error.failures)
    summary = read_summary(folder)
    if summary is None:
        missing = len(_unscanned(units, folder))
        if missing:
            print(
                f"{missing} of {len(units)} units are not scanned; run again, or wait for other "
                "jobs"
            )
        return {}
    mapped.forget(mapped.cache_folder(folder))
    if processes.writes:
        print(report.describe(summary))
        print(f"look at {files.join(folder, report.PAGE)}")
    return {}


def _prepare(
    config: ml_collections.ConfigDict, units: Sequence[Unit], folder: str, processes: Processes
) -> bool:
    """Settles what the folder holds; whether nobody else is writing its output now."""
    problems: dict[str, str] = {}
    is_free, refusal = True, None
    if processes.writes:
        with claim.take(folder) as own:
            is_free = own is not None
            try:
                if is_free:
                    _settle(config, units, folder)
            except ValueError as error:
                refusal, problems = error, {folder: str(error)}
    if processes.in_step:
        if not is_free:
            problems = {folder: "another job writes it"}
        with contextlib.suppress(*([StageFailedError] if refusal else [])):
            processes.agree(problems)
    if refusal is not None:
        raise refusal
    return is_free


def _unscanned(units: Sequence[Unit], folder: str) -> list[Unit]:
    present = set(files.list_names(files.join(folder, SCAN)))
    return [unit for unit in units if os.path.basename(unit.stem) + ROWS not in present]


def _scan(
    config: ml_collections.ConfigDict,
    units: Sequence[Unit],
    folder: str,
    options: Mapping[str, Any],
) -> dict[str, str]:
    pending = _unscanned(units, folder)
    logging.info("%d units, %d of them done before", len(units), len(units) - len(pending))
    function = functools.partial(scan_unit, config=config)
    return run_pending(function, pending, label="scan", **options)


def _find(
    config: ml_collections.ConfigDict,
    units: Sequence[Unit],
    folder: str,
    processes: Processes,
) -> None:
    starts = Rows(units, mapped.cache_folder(folder)).starts
    if not starts[-1]:
        raise ValueError(f"config.input='{config.input}': no pairs")
    search = Search(config, folder, tuple(units), starts)
    stages.find_all(search, processes)
    buckets = block_table.write_all(search, processes)
    if processes.writes:
        with claim.take(folder) as own:
            if own is not None:
                own.announce_writing()
                if read_summary(folder) is None:
                    _describe_all(search, buckets)
    processes.agree({})


def _describe_all(search: Search, buckets: int) -> None:
    """Writes what is about all pairs: the table for the filter, the report and the summary."""
    config, folder = search.config, search.folder
    sizes = stages.cluster_sizes(search)
    facts = block_table.read_facts(search)
    exact, near = (sum(block[kind] for block in facts) for kind in ("exact", "near"))
    least = config.verify.correlation
    summary = {
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
    shown = [block["report"] for block in facts]
    page = report.render(summary, shown, sizes[sizes > 0], search.rows, config)
    files.write_bytes(files.join(folder, report.PAGE), page.encode("utf-8", "replace"))
    write_summary(folder, summary)


def _list_units(
    config: ml_collections.ConfigDict, sources: Sequence[SourceShard], folder: str
) -> list[Unit]:
    stem = files.join(folder, SCAN, "{:05d}")
    if config.input is None:
        paths = given.find_files(config.embeddings.files)
        if not paths:
            raise ValueError(
                f"config.embeddings.files='{config.embeddings.files}': no such file; expected "
                ".npz or .parquet files"
            )
        return [Unit(path, stem.format(i)) for i, path in enumerate(paths)]
    if config.embeddings.kind != "files":
        return [Unit(source, stem.format(i)) for i, source in enumerate(sources)]
    files_of = given.files_of_shards(config.embeddings.files, len(sources))
    _check_embedded(config, sources, files_of)
    return [
        Unit(source, stem.format(i), found)
        for i, (source, found) in enumerate(zip(sources, files_of, strict=True))
    ]


def _check_embedded(
    config: ml_collections.ConfigDict,
    sources: Sequence[SourceShard],
    files_of: Sequence[tuple[str, ...]],
) -> None:
    try:
        before = given.list_shards(config.embeddings.files)
    except ValueError as error:
        raise ValueError(f"config.embeddings.files={error}") from error
    now = [(s["path"], s["start"]) for s in (source.identity() for source in sources)]
    if before != now or not all(files_of):
        raise ValueError(
            f"config.embeddings.files='{config.embeddings.files}' is of another input than "
            f"config.input='{config.input}', or not complete; run diht_jax.embed on this input"
        )


def _settle(config: ml_collections.ConfigDict, units: Sequence[Unit], folder: str) -> None:
    """Removes of the folder what other settings have decided.

    Raises:
        ValueError: it holds the units of another input, or other embeddings.
    """
    settings = json.loads(json.dumps(_describe(config, units)))
    path = files.join(folder, SETTINGS)
    before = files.read_object(path)
    if before is not None:
        later = {key for keys, _ in _LATER for key in keys}
        changed = sorted(k for k in settings if before.get(k) != settings[k])
        refused = [key for key in changed if key not in later]
        if refused:
            raise ValueError(
                f"'{folder}' holds duplicates of other settings; changed: {', '.join(refused)}. "
                "Choose another config.output, or delete the folder"
            )
        if changed:
            first = min(i for i, (keys, _) in enumerate(_LATER) if set(keys) & set(changed))
            for name in reversed([name for _, names in _LATER[first:] for name in names]):
                _remove(files.join(folder, name))
    if before != settings:
        files.write_bytes(path, (json.dumps(settings, indent=1) + "\n").encode())


def _describe(config: ml_collections.ConfigDict, units: Sequence[Unit]) -> dict[str, Any]:
    settings = duplicates_config.record_settings(config)
    # How many rows lie on the devices does not decide.
    settings["clusters"].pop("chunk_rows")
    if config.embeddings.kind == "descriptor":
        settings["descriptor"] = descriptor.VERSION
    elif config.verify.correlation is not None:
        settings["thumbnails"] = True
    settings["units"] = [
        unit.source if isinstance(unit.source, str) else unit.source.identity() for unit in units
    ]
    settings["given"] = [[p, file_size(p)] for unit in units for p in unit.embeddings]
    return settings


def _remove(path: str) -> None:
    """Removes a file, and the files of a folder."""
    for name in files.list_names(path):
        files.remove(files.join(path, name))
    if is_remote(path) or not os.path.isdir(path):
        files.remove(path)
