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
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.filtering import config as filter_config
from data_prep.filtering import kept, resharding, stale_outputs
from data_prep.filtering import shard as filter_shard_module
from data_prep.filtering.decisions import decisions_path
from data_prep.filtering.steps import registry
from data_prep.jobs import files, shards
from data_prep.jobs.crash_search import after_death
from data_prep.jobs.engine import RaySettings, print_failures, run_pending
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
    inputs = source_list.list_sources(config.input, config.source)
    folder = source_list.check_output(config.output, inputs)
    tasks = _plan_parts(config, inputs, folder, overwrite)
    mine = source_list.shards_of_task(tasks, task_index, num_tasks)
    failures = _filter_parts(config, tasks, mine, folder, engine)
    parts = load_parts(tasks)
    if len(parts) == len(tasks) and not failures:
        planned = plan_output(config, parts, folder)
        if _records_missing(parts, planned, folder):
            return failures | _report_incomplete(len(parts), len(tasks), config, parts)
        if not _is_complete(config, tasks, planned, folder):
            failures = _write_output(config, parts, planned, folder, engine)
            if failures and _is_complete(config, tasks, planned, folder):
                failures = {}  # another job of the array was faster, and has cleaned up
        if not failures:
            _show(folder, len(planned))
            if not config.keep_parts:
                for task, _ in parts:
                    resharding.remove_records(task)
    else:
        _report_incomplete(len(parts), len(tasks), config, parts)
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


def load_parts(tasks: Sequence[shards.ShardTask]) -> list[Part]:
    """The tasks that were done, by this config on this input, with their statistics.

    Without the counts, so that the memory does not grow with them.
    """
    parts = []
    for task in tasks:
        stats = shards.read_stats(task)
        if stats is not None and shards.explain_change(task, stats) is None:
            parts.append((task, {name: stats[name] for name in _KEPT_STATS}))
    return parts


def merge_parts(config: ml_collections.ConfigDict, parts: Sequence[Part]) -> FilterReport:
    """The report of the parts that are done."""
    return gather_report(
        [task for task, _ in parts],
        job={
            "input": config.input,
            "output": config.output,
            "settings": filter_config.record_settings(config),
            "config_hash": parts[0][1]["config_hash"] if parts else None,
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
    config: ml_collections.ConfigDict, inputs: Sequence[Any], folder: str, overwrite: bool
) -> list[shards.ShardTask]:
    """The tasks; what they must not replace is an error, unless it is to be overwritten."""
    os.makedirs(folder, exist_ok=True)
    foreign = resharding.find_foreign(folder, config.output_format)
    if foreign:
        raise ValueError(
            f"'{folder}' holds {len(foreign)} shards that do not belong to this run, such as "
            f"'{foreign[0]}'; choose an empty folder, or delete them"
        )
    settings = filter_config.describe_settings(config)
    parts_folder = os.path.join(folder, resharding.PARTS)
    if overwrite and os.path.isdir(parts_folder):
        _remove_surplus(parts_folder, len(inputs))
    tasks = shards.plan_tasks(
        inputs,
        parts_folder,
        dataset=config.dataset_name,
        split=config.split,
        config_hash=filter_config.hash_settings(settings),
    )
    versions = filter_config.package_versions(config)
    if stale_outputs.reject_or_remove_stale(
        tasks, parts_folder, settings, versions, overwrite=overwrite
    ):
        forget_output(folder)
    if not overwrite:
        _check_layout(config, tasks, folder)
    return tasks


def forget_output(folder: str) -> None:
    """Removes what describes the whole output, before a part of it changes."""
    for name in MERGED_FILES:
        (pathlib.Path(folder) / name).unlink(missing_ok=True)


def _remove_surplus(parts_folder: str, count: int) -> None:
    """Removes parts of an input that had more shards."""
    names = sorted(p.name for p in pathlib.Path(parts_folder).glob("*.tfrecord.stats.json"))
    for name in names[count:]:
        resharding.remove_output(os.path.join(parts_folder, name.removesuffix(shards.STATS_SUFFIX)))


def _check_layout(
    config: ml_collections.ConfigDict, tasks: Sequence[shards.ShardTask], folder: str
) -> None:
    """Refuses to read again, unasked, what a complete job has read and then cleaned away."""
    path = pathlib.Path(folder) / shards.MERGED_STATS
    merged = shards.read_json(path) if path.exists() else None
    if merged is None:
        return
    before, now = _layout(merged), {"inputs": len(tasks)} | _layout(config)
    cleaned = [t for t, stats in load_parts(tasks) if not shards.has_output(t, stats)]
    differing = [name for name in now if before[name] != now[name]]
    if differing and cleaned:
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
    tasks: Sequence[shards.ShardTask],
    mine: Sequence[shards.ShardTask],
    folder: str,
    engine: str,
) -> dict[str, str]:
    """Filters the input shards of this job that are not done, or whose records are needed again."""
    done = {task.output for task, _ in load_parts(tasks)}
    pending = [task for task in mine if task.output not in done]
    logging.info("%d shards, %d of them done before", len(mine), len(mine) - len(pending))
    if pending:
        forget_output(folder)
    parts_folder = os.path.join(folder, resharding.PARTS)
    shards.remove_temporary_files(parts_folder, [os.path.basename(task.output) for task in mine])
    steps = registry.active_steps(config)
    function = functools.partial(filter_shard_module.filter_shard, config=config, steps=steps)
    options = engine_options(config, engine) | {"label": "filter", "after_death": after_death}
    failures = run_pending(function, pending, **options)
    parts = load_parts(tasks)
    if len(parts) < len(tasks):
        return failures
    # Records that were cleaned away, or damaged, may be wanted once more.
    missing = _records_missing(parts, plan_output(config, parts, folder), folder)
    again = [task for task in mine if task in missing]
    if again:
        logging.warning(
            "%d finished shards are read again, since records that were made from them are "
            "missing or damaged, such as those of %s",
            len(again),
            again[0].source,
        )
    return failures | run_pending(function, again, **options)


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
    if not (pathlib.Path(folder) / kept.KEYS_FILE).exists():
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
    shards.remove_temporary_files(os.path.join(folder, resharding.PARTS), [stale_outputs.SETTINGS])
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
    done: int, tasks: int, config: ml_collections.ConfigDict, parts: Sequence[Part]
) -> dict[str, str]:
    if parts:
        print_funnel(merge_parts(config, parts))
    print(f"{done} of {tasks} shards are done; run the command again, or wait for the other jobs")
    return {}
