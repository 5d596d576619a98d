"""The parts of a filter job, one for each input shard: planned, compared with what is there, made.

They lie in the folder `parts` of the output and are re-sharded, or are the output themselves where
`config.examples_per_shard` is None. What becomes of the parts belongs in `job`, what happens to a
pair in `shard`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.decisions import lists, table
from data_prep.decisions.report import REPORT
from data_prep.filtering import config as filter_config
from data_prep.filtering import resharding, reuse, stale_outputs
from data_prep.filtering import shard as filter_shard_module
from data_prep.jobs import manifest, shards
from data_prep.jobs.crash_search import after_death
from data_prep.jobs.engine import engine_options
from data_prep.jobs.failures import Failures, run_noting_failures
from data_prep.jobs.manifest import Input
from data_prep.jobs.packed import PackedList
from data_prep.reports.page import PAGE
from data_prep.steps import registry
from diht_jax.records import dataset_info
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.formats.registry import FORMATS
from diht_jax.storage import files

# What describes the whole output.
MERGED_FILES = (
    *(shards.MERGED_STATS, INDEX_NAME, *dataset_info.FILES, dataset_info.SIZES),
    *(lists.KEYS_FILE, lists.UIDS_FILE, REPORT, PAGE),
)


def parts_folder(config: ml_collections.ConfigDict, folder: str) -> str:
    """Where the parts of an output folder lie."""
    return folder if config.examples_per_shard is None else files.join(folder, resharding.PARTS)


def plan_parts(
    config: ml_collections.ConfigDict, inputs: Sequence[Input], folder: str, overwrite: bool
) -> Sequence[shards.ShardTask]:
    """The part of every input; makes the folders.

    Raises:
        ValueError: the folder holds shards of others, or was made in the other way and is not to
            be overwritten.
    """
    files.make_folder(folder)
    _settle_layout(config, folder, overwrite)
    foreign = _find_foreign(config, folder)
    if foreign:
        raise ValueError(
            f"'{folder}' holds {len(foreign)} shards that do not belong to this run, such as "
            f"'{foreign[0]}'; choose an empty folder, or delete them"
        )
    are_output = config.examples_per_shard is None
    return manifest.plan_parts(
        inputs,
        parts_folder(config, folder),
        dataset=config.dataset_name,
        split=config.split,
        config_hash=filter_config.hash_config(config),
        output_format=config.output_format if are_output else "tfrecord",
        identity=config.input_identity,
    )


def settle_changes(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    mine: Sequence[shards.ShardTask],
    folder: str,
    overwrite: bool,
) -> dict[str, dict[str, Any]]:
    """The statistics of this job's parts that are done, without counts.

    Raises:
        ValueError: something has changed, and it is not to be overwritten.
    """
    finished = stale_outputs.reject_or_remove_stale(
        mine,
        tasks,
        parts_folder(config, folder),
        filter_config.describe_settings(config),
        filter_config.package_versions(config),
        overwrite=overwrite,
        max_changed=config.max_changed_shards,
    )
    if finished.removed:
        forget_output(folder)
    if config.examples_per_shard is None:
        return with_whole_outputs(mine, finished.stats)
    if not overwrite:
        _check_records(config, tasks, finished.stats, folder)
    return finished.stats


def with_whole_outputs(
    tasks: Sequence[shards.ShardTask], stats: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The statistics of those tasks whose outputs are there, since nothing else holds them."""
    found = [(task, stats[task.output]) for task in tasks if task.output in stats]
    damaged = shards.damaged_outputs(found)
    return {task.output: known for task, known in found if task.output not in damaged}


def forget_output(folder: str) -> None:
    """Removes what describes the whole output, before a part of it changes."""
    for name in MERGED_FILES:
        files.remove(files.join(folder, name))


def filter_parts(
    config: ml_collections.ConfigDict,
    mine: Sequence[shards.ShardTask],
    done: Collection[str],
    folder: str,
    engine: str,
) -> Failures:
    """Filters the inputs of this job whose parts are not done; failures are noted beside them."""
    pending = PackedList(task for task in mine if task.output not in done)
    logging.info("%d shards, %d of them done before", len(mine), len(mine) - len(pending))
    if pending:
        forget_output(folder)
    where = parts_folder(config, folder)
    shards.remove_temporary_files(where, (os.path.basename(task.output) for task in mine))
    return run_filter(config, pending, engine)


def run_filter(
    config: ml_collections.ConfigDict, pending: Sequence[shards.ShardTask], engine: str
) -> Failures:
    """Filters some inputs; failures are noted beside their parts."""
    steps = registry.active_steps(config)
    function = functools.partial(filter_shard_module.filter_shard, config=config, steps=steps)
    options = engine_options(config, engine) | {"label": "filter", "after_death": after_death}
    return run_noting_failures(function, pending, options)


def _settle_layout(config: ml_collections.ConfigDict, folder: str, overwrite: bool) -> None:
    """Refuses, or removes on request, what was made with re-sharding and now is to be without.

    The same the other way round.
    """
    are_output = config.examples_per_shard is None
    other = files.join(folder, resharding.PARTS) if are_output else folder
    if not files.exists(files.join(other, filter_config.SETTINGS)):
        return
    if not overwrite:
        before = "a number" if are_output else "None"
        raise ValueError(
            f"'{folder}' was made with config.examples_per_shard={before}, now it is "
            f"{config.examples_per_shard}: all input shards would have to be filtered again. "
            "Choose another output, or make it again with --overwrite"
        )
    forget_output(folder)
    if are_output:
        resharding.remove_stale_shards(folder, [], config.output_format)
        reuse.remove_previous(folder)
        stale = files.list_names(other)
    else:
        names = [entry.name for entry in manifest.read_manifest(folder)]
        stale = shards.names_below(files.list_names(folder), names)
        stale += [manifest.NAME, filter_config.SETTINGS]
    # The settings last: until then the folder is known for what it is.
    for name in sorted(stale, key=lambda name: name == filter_config.SETTINGS):
        files.remove(files.join(other, name))


def _find_foreign(config: ml_collections.ConfigDict, folder: str) -> list[str]:
    """Names of the shards in a folder that training would read, and no filter has written."""
    if config.examples_per_shard is not None:
        return resharding.find_foreign(folder, config.output_format)
    suffix = re.escape(FORMATS[config.output_format].suffix)
    named = re.compile(rf"{config.dataset_name}-{config.split}-[0-9a-f]{{16}}{suffix}")
    present = set(files.list_names(folder))

    def is_ours(name: str) -> bool:
        # Or half-done: killed before its statistics.
        whole = name + table.SUFFIX in present or name + shards.STATS_SUFFIX not in present
        return named.fullmatch(name) is not None and whole

    return [n for n in shards.read_shards(folder, config.output_format) if not is_ours(n)]


def _check_records(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    done: Collection[str],
    folder: str,
) -> None:
    """Refuses to read again, unasked, what a complete job has read and then cleaned away.

    Most records are found again in the output; see `reuse`.
    """
    try:
        merged = shards.read_json(files.join(folder, shards.MERGED_STATS))
    except FileNotFoundError:
        return
    before, now = layout(merged), {"inputs": len(tasks)} | layout(config)
    differing = [name for name in now if before.get(name) != now[name]]
    if not differing:
        return
    present = set(files.list_names(files.join(folder, resharding.PARTS)))
    is_copied = before["output_format"] in reuse.COPIED_FORMATS

    def is_lost(name: str) -> bool:
        return name not in present and not (is_copied and name + table.SUFFIX in present)

    lost = [output for output in done if is_lost(os.path.basename(output))]
    if lost:
        name = differing[0]
        what = (
            f"the input had {before.get(name)} shards and has {now[name]}"
            if name == "inputs"
            else f"{name} was {before.get(name)} and is {now[name]}"
        )
        raise ValueError(
            f"'{folder}' is complete, and {what}: {len(lost)} input shards would have to be "
            "read again, since records cannot be copied out of tars. Choose another output, or "
            "make it again with --overwrite; config.keep_parts=True would have kept what is needed"
        )


def read_written(
    config: ml_collections.ConfigDict, tasks: Sequence[shards.ShardTask], folder: str
) -> dict[str, Any] | None:
    """The merged statistics of these tasks, if they are there; no other statistics are read.

    A job that had parts to filter has removed older ones: then another job has written these, when
    all were done.
    """
    merged = files.read_object(files.join(folder, shards.MERGED_STATS))
    if merged is None or merged.get("config_hash") != tasks[0].config_hash:
        return None
    expected = {"inputs": len(tasks)} | layout(config)
    is_same = all(expected.get(name) == value for name, value in layout(merged).items())
    names = files.list_names(tasks[0].output.rpartition("/")[0])
    failed = sum(name.endswith(shards.FAILED_SUFFIX) for name in names)
    return merged if is_same and failed == len(merged.get("failed", ())) else None


def layout(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which output shards the parts make, of a config or of merged statistics."""
    names = ("inputs", "examples_per_shard", "output_format")
    return {name: settings[name] for name in names if name in settings}
