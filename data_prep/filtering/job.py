"""A whole filter job: the parts, one per input shard, then the output shards and the report.

The folder of the output:

    parts/       what was filtered of every input shard: records (removed in the end), statistics,
                 samples and time
    *.tfrecord   the records of all parts, in shards of equal size (`resharding`); or *.array_record
                 or *.tar, as config.output_format has it
    dataset.index  where the records of all shards lie (`diht_jax.data.index`)
    stats.json, report.json, report.html, kept_keys.txt, kept_uids.npy
    dataset_info.json, features.json; for tars sizes.json

What is done to a pair belongs in `shard`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.filtering import config as filter_config
from data_prep.filtering import kept, resharding, stale_outputs
from data_prep.filtering import shard as filter_shard_module
from data_prep.filtering.decisions import decisions_path
from data_prep.filtering.steps import registry
from data_prep.jobs import files, manifest, shards
from data_prep.jobs.crash_search import after_death
from data_prep.jobs.engine import RaySettings, print_failures, run_pending
from data_prep.jobs.manifest import Input
from data_prep.reports.noise_scores import format_noise_table
from data_prep.reports.page import PAGE, write_report
from data_prep.reports.summary import REPORT, FilterReport, gather_report, read_report
from data_prep.sources import list as source_list
from diht_jax.data.records import dataset_info
from diht_jax.data.records.dataset_index import INDEX_NAME
from diht_jax.data.records.formats.registry import FORMATS

Part = tuple[shards.ShardTask, dict[str, Any]]

# What describes the whole output.
MERGED_FILES = (
    *(shards.MERGED_STATS, INDEX_NAME, *dataset_info.FILES, dataset_info.SIZES),
    *(kept.KEYS_FILE, kept.UIDS_FILE, REPORT, PAGE),
)
_KEPT_STATS = ("config_hash", "input", "output")


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
    overwrite: bool = False,
) -> dict[str, str]:
    """Does what is not done yet; arguments and errors as of `data_prep.filter.run_filter`."""
    inputs = source_list.list_inputs(config.input, config.source)
    folder = source_list.check_output(config.output, [found.shard for found in inputs])
    tasks = _plan_parts(config, inputs, folder)
    mine = source_list.shards_of_task(tasks, task_index, num_tasks)
    done = _settle_changes(config, tasks, mine, folder, overwrite)
    failures = _filter_parts(config, mine, done, folder, engine)
    parts = load_parts(tasks, done)
    if len(parts) < len(tasks) or failures:
        _report_incomplete(config, parts, len(tasks), shows_funnel=num_tasks == 1)
        return print_failures(failures)
    planned = plan_output(config, parts, folder)
    missing = _records_missing(parts, planned, folder)
    if missing:
        failures = _filter_again(config, missing, mine, folder, engine)
        parts = load_parts(tasks)
        planned = plan_output(config, parts, folder)
        if failures or _records_missing(parts, planned, folder):
            _report_incomplete(config, parts, len(tasks), shows_funnel=num_tasks == 1)
            return print_failures(failures)
    if not _is_complete(config, tasks, planned, folder):
        failures = _write_output(config, parts, planned, folder, engine)
        if failures and _is_complete(config, tasks, planned, folder):
            failures = {}  # another job of the array was faster, and has cleaned up
    if not failures:
        _show(folder, len(planned))
        if not config.keep_parts:
            resharding.remove_records(os.path.join(folder, resharding.PARTS), tasks)
    return print_failures(failures)


def engine_options(config: ml_collections.ConfigDict, engine: str) -> dict[str, Any]:
    """How the tasks of a config are run: keywords of `run_pending`.

    Args:
        config: how many workers, retries, and which cluster.
        engine: one of `engine.ENGINES`.
    """
    return {
        "num_workers": config.num_workers,
        "retries": config.retries,
        "timeout_secs": config.shard_timeout_secs,
        "ray": RaySettings(**config.ray.to_dict()) if engine == "ray" else None,
    }


def load_parts(
    tasks: Sequence[shards.ShardTask], known: Mapping[str, dict[str, Any]] | None = None
) -> list[Part]:
    """The tasks that were done, by this config on this input, with their statistics.

    Without the counts, so that the memory does not grow with them. Where some tasks are not done,
    by the names in the folder, none of the others' statistics is read.

    Args:
        tasks: of one folder, in order.
        known: output -> such statistics that were read before, and need not be read again.
    """
    known = known or {}
    present = set(files.list_names(os.path.dirname(tasks[0].output))) if tasks else set()
    there = [task for task in tasks if os.path.basename(task.stats_path) in present]
    if len(there) < len(tasks):
        return [(task, known.get(task.output, {})) for task in there]
    unread = [task for task in there if task.output not in known]
    read = {
        task.output: shards.without_counts(stats)
        for task, stats, change in shards.check_all(unread)
        if stats is not None and change is None
    }
    found = {**known, **read}
    return [(task, found[task.output]) for task in tasks if task.output in found]


def merge_parts(config: ml_collections.ConfigDict, parts: Sequence[Part]) -> FilterReport:
    """The report of the parts that are done."""
    return gather_report(
        [task for task, _ in parts],
        job={
            "input": config.input,
            "output": config.output,
            "settings": filter_config.record_settings(config),
            "config_hash": parts[0][0].config_hash if parts else None,
        },
        samples_per_outcome=config.samples_per_outcome,
        report_samples=config.report_samples,
        seed=config.seed,
        clean_label=config.clean_label,
    )


def print_funnel(report: FilterReport) -> None:
    """The funnel, what img2dataset counted, and the filters against known noise."""
    if report.download:
        d = report.download
        print(
            f"img2dataset: {d['count']:,} rows, {d['successes']:,} downloaded, "
            f"{d['failed_to_download']:,} failed to download, {d['failed_to_resize']:,} to resize"
        )
    print(report.funnel.format_table())
    for warning in report.warnings():
        logging.warning("%s", warning)
    if report.measures.labels:
        print()
        print(format_noise_table(report.measures.labels, report.clean_label))


def plan_output(
    config: ml_collections.ConfigDict, parts: Sequence[Part], folder: str
) -> list[resharding.BalancedShard]:
    """The output shards that all parts together make."""
    return resharding.plan_shards(
        parts,
        folder,
        dataset=config.dataset_name,
        split=config.split,
        examples_per_shard=config.examples_per_shard,
        output_format=config.output_format,
    )


def _plan_parts(
    config: ml_collections.ConfigDict, inputs: Sequence[Input], folder: str
) -> list[shards.ShardTask]:
    """The part of every input; makes the folders.

    Raises:
        ValueError: the folder holds shards of others.
    """
    files.make_folder(folder)
    foreign = resharding.find_foreign(folder, config.output_format)
    if foreign:
        raise ValueError(
            f"'{folder}' holds {len(foreign)} shards that do not belong to this run, such as "
            f"'{foreign[0]}'; choose an empty folder, or delete them"
        )
    return manifest.plan_parts(
        inputs,
        files.join(folder, resharding.PARTS),
        dataset=config.dataset_name,
        split=config.split,
        config_hash=filter_config.hash_config(config),
        identity=config.input_identity,
    )


def _settle_changes(
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
        [os.path.basename(task.output) for task in tasks],
        files.join(folder, resharding.PARTS),
        filter_config.describe_settings(config),
        filter_config.package_versions(config),
        overwrite=overwrite,
    )
    if finished.removed:
        forget_output(folder)
    if not overwrite:
        _check_layout(config, tasks, finished.stats, folder)
    return finished.stats


def forget_output(folder: str) -> None:
    """Removes what describes the whole output, before a part of it changes."""
    for name in MERGED_FILES:
        files.remove(files.join(folder, name))


def _check_layout(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    done: Collection[str],
    folder: str,
) -> None:
    """Refuses to read again, unasked, what a complete job has read and then cleaned away."""
    try:
        merged = shards.read_json(files.join(folder, shards.MERGED_STATS))
    except FileNotFoundError:
        return
    before, now = _layout(merged), {"inputs": len(tasks)} | _layout(config)
    differing = [name for name in now if before[name] != now[name]]
    if not differing:
        return
    cleaned = [output for output in done if not files.exists(output)]
    if cleaned:
        name = differing[0]
        what = (
            f"the input had {before[name]} shards and has {now[name]}"
            if name == "inputs"
            else f"{name} was {before[name]} and is {now[name]}"
        )
        raise ValueError(
            f"'{folder}' is complete, and {what}: {len(cleaned)} input shards would have to be "
            "read again. Choose another output, or make it again with --overwrite; "
            "config.keep_parts=True would have kept what is needed"
        )


def _layout(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which output shards the parts make, of a config or of merged statistics.

    Statistics of TFRecords do not state their format: older ones had no other.
    """
    names = ("inputs", "examples_per_shard", "output_format")
    return {"output_format": "tfrecord"} | {n: settings[n] for n in names if n in settings}


def _filter_parts(
    config: ml_collections.ConfigDict,
    mine: Sequence[shards.ShardTask],
    done: Collection[str],
    folder: str,
    engine: str,
) -> dict[str, str]:
    """Filters the inputs of this job whose parts are not done; returns failures by source."""
    pending = [task for task in mine if task.output not in done]
    logging.info("%d shards, %d of them done before", len(mine), len(mine) - len(pending))
    if pending:
        forget_output(folder)
    parts_folder = files.join(folder, resharding.PARTS)
    shards.remove_temporary_files(parts_folder, [os.path.basename(task.output) for task in mine])
    return _run_filter(config, pending, engine)


def _filter_again(
    config: ml_collections.ConfigDict,
    missing: Sequence[shards.ShardTask],
    mine: Sequence[shards.ShardTask],
    folder: str,
    engine: str,
) -> dict[str, str]:
    """Filters parts whose records were cleaned away, or damaged, and are wanted once more."""
    outputs = {task.output for task in mine}
    again = [task for task in missing if task.output in outputs]
    if again:
        logging.warning(
            "%d finished shards are read again, since records that were made from them are "
            "missing or damaged, such as those of %s",
            len(again),
            again[0].source,
        )
    return _run_filter(config, again, engine)


def _run_filter(
    config: ml_collections.ConfigDict, tasks: Sequence[shards.ShardTask], engine: str
) -> dict[str, str]:
    steps = registry.active_steps(config)
    function = functools.partial(filter_shard_module.filter_shard, config=config, steps=steps)
    options = engine_options(config, engine) | {"label": "filter", "after_death": after_death}
    return run_pending(function, tasks, **options)


def _records_missing(
    parts: Sequence[Part], planned: Sequence[resharding.BalancedShard], folder: str
) -> list[shards.ShardTask]:
    """Parts whose records are still needed for an output shard, or for the lists, but gone."""
    needed = {
        piece.path
        for shard in planned
        if resharding.load_written(shard) is None
        for piece in shard.slices
    }
    if not files.exists(files.join(folder, kept.KEYS_FILE)):
        needed |= {t.output for t, _ in parts if not files.exists(decisions_path(t.output))}
    return [t for t, stats in parts if t.output in needed and not shards.has_output(t, stats)]


def _is_complete(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    planned: Sequence[resharding.BalancedShard],
    folder: str,
) -> bool:
    names = (shards.MERGED_STATS, REPORT, PAGE, *_described_by(config.output_format))
    paths = [pathlib.Path(folder) / name for name in names]
    if not all(path.exists() for path in paths):
        return False
    same = _layout(shards.read_json(paths[0])) == {"inputs": len(tasks)} | _layout(config)
    return same and all(resharding.load_written(shard) is not None for shard in planned)


def _described_by(output_format: str) -> tuple[str, ...]:
    """The files that describe the shards of a format to other programs."""
    has_tfds = FORMATS[output_format].tfds_name is not None
    return dataset_info.FILES if has_tfds else (dataset_info.SIZES,)


def _write_output(
    config: ml_collections.ConfigDict,
    parts: Sequence[Part],
    planned: Sequence[resharding.BalancedShard],
    folder: str,
    engine: str,
) -> dict[str, str]:
    """Re-shards, then writes all that describes the whole folder."""
    report = merge_parts(config, parts)
    if not report.funnel.kept:
        print_funnel(report)
        write_report(folder, report)
        raise ValueError(
            f"none of the {report.funnel.read} pairs of '{config.input}' was kept; the reasons are "
            f"in the table above, examples in {folder}/{PAGE}"
        )
    shards.remove_merged(folder)
    resharding.remove_stale_shards(folder, planned, config.output_format)
    names = [os.path.basename(shard.output) for shard in planned]
    shards.remove_temporary_files(folder, [*names, *MERGED_FILES])
    described = [stale_outputs.SETTINGS, manifest.NAME]
    shards.remove_temporary_files(files.join(folder, resharding.PARTS), described)
    unwritten = [shard for shard in planned if resharding.load_written(shard) is None]
    failures = run_pending(
        resharding.write_shard, unwritten, label="re-shard", **engine_options(config, engine)
    )
    if failures:
        return failures
    with contextlib.suppress(FileNotFoundError):  # of parts that an older version has cleaned up
        kept.write_lists(folder, kept.read_kept(task.output for task, _ in parts))
    write_report(folder, report)
    _describe_output(config, planned, folder, report)
    shards.write_index(folder, [shard.output for shard in planned])
    merged = {
        "config": filter_config.record_settings(config),
        "input": config.input,
        "config_hash": parts[0][1]["config_hash"],
        "inputs": len(parts),
        "examples_per_shard": config.examples_per_shard,
        "shards": len(planned),
        "versions": report.versions_json(),
        "counts": report.funnel.to_json() | {"measures": report.measures.to_json()},
    }
    if config.output_format != "tfrecord":
        merged["output_format"] = config.output_format
    shards.write_json(pathlib.Path(folder) / shards.MERGED_STATS, merged)
    return {}


def _describe_output(
    config: ml_collections.ConfigDict,
    planned: Sequence[resharding.BalancedShard],
    folder: str,
    report: FilterReport,
) -> None:
    """Writes what other programs need to read the shards."""
    outputs = [resharding.load_written(shard)["output"] for shard in planned]
    tfds_name = FORMATS[config.output_format].tfds_name
    if tfds_name is None:
        sizes = {output["file"]: output["records"] for output in outputs}
        dataset_info.write_sizes(folder, sizes)
        return
    dataset_info.write_dataset_info(
        folder,
        dataset=config.dataset_name,
        split=config.split,
        shard_lengths=[output["records"] for output in outputs],
        num_bytes=sum(output["bytes"] for output in outputs),
        image_formats=report.funnel.image_formats,
        description=f"Image-text pairs of {config.input}, by data_prep.filter.",
        file_format=tfds_name,
    )


def _show(folder: str, num_shards: int) -> None:
    report = read_report(folder)
    print_funnel(report)
    print(f"{report.funnel.kept:,} pairs in {num_shards} shards: {folder}; look at {folder}/{PAGE}")


def _report_incomplete(
    config: ml_collections.ConfigDict, parts: Sequence[Part], num_tasks: int, *, shows_funnel: bool
) -> None:
    """Prints how far it is; the funnel needs the statistics of all parts that are done."""
    if parts and shows_funnel:
        print_funnel(merge_parts(config, parts))
    print(
        f"{len(parts)} of {num_tasks} shards are done; run the command again, or wait for the "
        "other jobs"
    )
