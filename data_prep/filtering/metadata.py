"""A whole job on metadata alone: rows of parquet or jsonl in, the kept rows and a report out.

It runs where `config.metadata_only` is set: C and A need no images, so that a list of URLs can be
filtered before anybody downloads them (DiHT, arXiv 2301.02280, "Complexity, Action, and
Text-spotting"; the order is ours). Rows are written as they came: the same columns and types in
parquet, the same bytes in jsonl. What is done to the rows belongs in `rows`.

The kept rows of `INPUT.parquet` are `OUTPUT/INPUT.parquet`; beside them lie stats.json,
report.json, report.html, kept_keys.txt and kept_uids.npy.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.decisions import lists, table
from data_prep.filtering import config as filter_config
from data_prep.filtering import job as filter_job
from data_prep.filtering import parts as filter_parts
from data_prep.filtering import stale_outputs
from data_prep.filtering.rows import PARQUET, filter_rows
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
from data_prep.reports.page import PAGE, write_report
from data_prep.sources import list as source_list
from data_prep.steps import registry
from diht_jax.readers.base import SourceShard
from diht_jax.readers.parquet import open_parquet
from diht_jax.readers.registry import list_shards
from diht_jax.storage import files, locks
from diht_jax.storage.stores import is_remote

JSONL_SUFFIX = ".jsonl"


# Of a parquet file in a store a unit has so many bytes at least: every unit reads the footer, too.
_STORE_UNIT_BYTES = 2**26


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
    folder = source_list.check_folder(config.output)
    units = list_units(config.input, config.source)
    if not units:
        raise ValueError(f"config.input='{config.input}': the tables have no rows")
    source_list.check_not_input(folder, units)
    files.make_folder(folder)
    settings = filter_config.describe_settings(config)
    config_hash = shards.hash_config(settings)
    names = name_outputs(units)
    tasks = [
        shards.ShardTask(unit, files.join(folder, name), config_hash, config.input_identity)
        for unit, name in zip(units, names, strict=True)
    ]
    mine = source_list.shards_of_task(tasks, task_index, num_tasks)
    versions = filter_config.package_versions(config)
    finished = stale_outputs.reject_or_remove_stale(
        mine,
        tasks,
        folder,
        settings,
        versions,
        overwrite=overwrite,
        max_changed=config.max_changed_shards,
    )
    if finished.removed:
        filter_parts.forget_output(folder)
    done = filter_parts.with_whole_outputs(mine, finished.stats)
    pending = [task for task in mine if task.output not in done]
    logging.info("%d tables, %d of them done before", len(mine), len(mine) - len(pending))
    if pending:
        filter_parts.forget_output(folder)
        names = [os.path.basename(task.output) for task in pending]
        for where in (folder, files.join(folder, table.FOLDER)):
            files.make_folder(where)
            shards.remove_temporary_files(where, names)
    function = functools.partial(filter_rows, config=config, steps=registry.active_steps(config))
    options = engine_options(config, engine)
    options |= {"label": "filter", "after_death": after_death}
    failures = run_noting_failures(function, pending, options)
    with locks.leader_lock(folder):
        merged = filter_parts.read_written(config, tasks, folder) if pending else None
        if merged is not None:
            print(f"{folder}: another job has written the output")
            failures = with_output(failures, merged.get("failed", ()))
        else:
            failures = _end(config, tasks, mine, folder, failures, done)
    return print_failures(failures)


def _end(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    mine: Sequence[shards.ShardTask],
    folder: str,
    failures: Failures,
    known: Mapping[str, dict[str, Any]],
) -> Failures:
    """Describes the folder if all jobs are done; returns the failures to report."""
    found = survey(tasks, known)
    if not is_unfinished(config.max_failed_shards, found, len(tasks)):
        _finish(config, found, folder)
        return with_output(failures, found.failed)
    has_all = len(mine) == len(tasks)
    filter_job.report_unfinished(config, found, folder, has_all=has_all)
    return failures


def _finish(config: ml_collections.ConfigDict, found: Survey, folder: str) -> None:
    """Prints the funnel, and writes what describes the whole folder."""
    tasks = [task for task, _ in found.parts]
    report = filter_job.merge_parts(config, found)
    filter_job.print_funnel(report)
    merged_path = files.join(folder, shards.MERGED_STATS)
    if not files.exists(merged_path):
        described = [*filter_parts.MERGED_FILES, filter_config.SETTINGS]
        shards.remove_temporary_files(folder, described)
        lists.write_lists(folder, lists.read_kept(task.output for task in tasks))
        write_report(folder, report)
        merged = {
            "config": filter_config.record_settings(config),
            "input": config.input,
            "config_hash": tasks[0].config_hash,
            "inputs": len(tasks) + len(found.failed),
            "versions": report["versions"],
            "counts": report["counts"] | {"measures": report["measures"]},
        }
        if found.failed:
            merged["failed"] = found.failed
        shards.write_json(merged_path, merged)
    kept = report["counts"]["kept"]
    print(f"{kept:,} rows in {len(tasks)} files: {folder}; look at {folder}/{PAGE}")


def list_units(pairs: str | None, source: ml_collections.ConfigDict) -> list[SourceShard]:
    """Divides tables into units of about `rows_per_shard` rows.

    Args:
        pairs: `config.input`: parquet and jsonl files, globs or folders of them.
        source: config section of `sources.list.default_source`.

    Returns:
        Units of a jsonl file are ranges of its bytes, those of a parquet file of its row groups.

    Raises:
        ValueError: nothing is found, another kind of file is named, or the column of captions is
            missing.
    """
    if not pairs:
        raise ValueError("config.input is not set: expected parquet or jsonl files with captions")
    options = source.to_dict() | {"image_column": None}  # no images are read
    units = []
    for text in source_list.typed_texts(pairs):
        for unit in list_shards(text, **options):
            if unit.kind == PARQUET:
                units += _list_row_groups(unit.path, source)
            elif unit.kind == "table" and unit.path.endswith(JSONL_SUFFIX):
                # Outputs of earlier runs name the column that the config has.
                own = {**unit.options, "image_column": source.image_column}
                units.append(dataclasses.replace(unit, options=own, reads_linked=False))
            else:
                raise ValueError(
                    f"{unit}: config.metadata_only filters tables of captions; expected .parquet "
                    "or .jsonl files"
                )
    return units


def name_outputs(units: Sequence[SourceShard]) -> list[str]:
    """File names of the outputs: those of the inputs, with a number for each of several units."""
    of_path = collections.Counter(unit.path for unit in units)
    number_of: collections.Counter[str] = collections.Counter()
    names = []
    for unit in units:
        stem, suffix = os.path.splitext(os.path.basename(unit.path))
        number = f"-{number_of[unit.path]:05d}" if of_path[unit.path] > 1 else ""
        number_of[unit.path] += 1
        names.append(f"{stem}{number}{suffix}")
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"{len(repeated)} names occur in several input folders, such as '{repeated[0]}'; "
            "filter one folder at a time"
        )
    return names


def _list_row_groups(path: str, source: ml_collections.ConfigDict) -> Iterator[SourceShard]:
    file = open_parquet(path, (0, 0))
    names = file.schema_arrow.names
    for column in (source.caption_column, source.key_column):
        if column is not None and column not in names:
            raise ValueError(
                f"{path}: no column '{column}'; found {', '.join(names)}; set "
                "config.source.caption_column or config.source.key_column"
            )
    start, rows, num_bytes, first_row = 0, 0, 0, 0
    least_bytes = _STORE_UNIT_BYTES if is_remote(path) else 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        rows += group.num_rows
        num_bytes += sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        is_last = number + 1 == file.metadata.num_row_groups
        if (rows >= source.rows_per_shard and num_bytes >= least_bytes) or is_last:
            options = {"first_row": first_row}
            yield SourceShard(PARQUET, path, start, number + 1, options)
            start, rows, num_bytes, first_row = number + 1, 0, 0, first_row + rows
