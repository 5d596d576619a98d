"""A whole job on metadata: every table filtered, lists of the kept rows, and the report.

`filter.py` calls `run` where `config.metadata_only` is set. The kept rows of `INPUT.parquet` are
`OUTPUT/INPUT.parquet`; beside them lie stats.json, report.json, report.html, kept_keys.txt and
kept_uids.npy. What is done to a row belongs in `metadata_filter.py`.
"""

from __future__ import annotations

import functools
import os
import pathlib

import ml_collections
from absl import logging

from data_prep.filtering import config as filter_config
from data_prep.filtering import job as filter_job
from data_prep.filtering import kept, metadata, stale_outputs
from data_prep.jobs import shards
from data_prep.jobs.engine import print_failures, run_pending
from data_prep.reports.page import PAGE, write_report
from data_prep.sources import list as source_list


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
    overwrite: bool = False,
) -> dict[str, str]:
    """Does what is not done yet; arguments and errors as of `filter.run_filter`."""
    if config.text_spotting or config.concepts:
        raise ValueError(
            "config.metadata_only reads no images: set config.text_spotting=False and "
            "config.concepts=False, as configs/prep/metadata.py does"
        )
    units = metadata.list_units(config.input, config.source)
    if not units:
        raise ValueError(f"config.input='{config.input}': the tables have no rows")
    folder = source_list.check_output(config.output, units)
    os.makedirs(folder, exist_ok=True)
    settings = filter_config.describe_settings(config)
    config_hash = filter_config.hash_settings(settings)
    tasks = [
        shards.ShardTask(unit, os.path.join(folder, name), config_hash)
        for unit, name in zip(units, metadata.name_outputs(units), strict=True)
    ]
    versions = filter_config.package_versions(config)
    if stale_outputs.reject_or_remove_stale(tasks, folder, settings, versions, overwrite=overwrite):
        filter_job.forget_output(folder)
    mine = source_list.take_share(tasks, task_index, num_tasks)
    pending = [task for task in mine if shards.load_finished(task) is None]
    logging.info("%d tables, %d of them done before", len(mine), len(mine) - len(pending))
    if pending:
        filter_job.forget_output(folder)
        shards.remove_litter(folder, [os.path.basename(task.output) for task in pending])
    function = functools.partial(metadata.filter_rows, config=config)
    failures = run_pending(
        function, pending, label="filter", **filter_job.engine_options(config, engine)
    )
    _finish(config, tasks, folder)
    return print_failures(failures)


def _finish(config: ml_collections.ConfigDict, tasks: list[shards.ShardTask], folder: str) -> None:
    """Prints the funnel; writes what describes the whole folder when every table is done."""
    parts = filter_job.load_parts(tasks)
    report = filter_job.merge_parts(config, parts)
    filter_job.print_funnel(report)
    if len(parts) < len(tasks):
        print(
            f"{len(parts)} of {len(tasks)} tables are done; run the command again, or wait for the "
            "other jobs"
        )
        return
    merged_path = pathlib.Path(folder) / shards.MERGED_STATS
    if not merged_path.exists():
        shards.remove_litter(folder, [*filter_job.MERGED_FILES, stale_outputs.SETTINGS])
        kept.write_lists(folder, [kept.kept_path(task.output) for task in tasks])
        write_report(folder, report)
        counts = report.funnel.to_json() | {"measures": report.measures.to_json()}
        merged = {
            "config": filter_config.record_settings(config),
            "input": config.input,
            "config_hash": tasks[0].config_hash,
            "inputs": len(tasks),
            "versions": report.versions_json(),
            "counts": counts,
        }
        shards.write_json(merged_path, merged)
    print(f"{report.funnel.kept:,} rows in {len(tasks)} files: {folder}; look at {folder}/{PAGE}")
