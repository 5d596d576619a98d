"""A whole filter job: the parts, one per input shard, then the output shards and the report.

The folder of the output:

    parts/       what was filtered of every input shard: records (removed in the end), statistics,
                 samples and time; with config.examples_per_shard=None the parts lie in the folder
                 itself, and are the output
    *.tfrecord   the records of all parts, in shards of equal size (`resharding`); or *.array_record
                 or *.tar, as config.output_format has it
    dataset.index  where the records of all shards lie (`diht_jax.data.index`)
    stats.json, report.json, report.html, kept_keys.txt, kept_uids.npy
    dataset_info.json, features.json; for tars sizes.json

What is done to a pair belongs in `shard`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.decisions import lists, table
from data_prep.decisions.noise_scores import format_noise_table
from data_prep.decisions.report import REPORT, Report, gather, get_funnel, read_report
from data_prep.filtering import config as filter_config
from data_prep.filtering import parts, resharding, reuse
from data_prep.filtering.resharding import Part
from data_prep.jobs import manifest, shards
from data_prep.jobs.engine import engine_options, print_failures, run_pending
from data_prep.jobs.failures import Failures, Survey, is_unfinished, survey, with_output
from data_prep.jobs.packed import PackedList
from data_prep.reports.page import PAGE, write_report
from data_prep.sources import list as source_list
from data_prep.steps.registry import active_steps
from diht_jax.records import dataset_info
from diht_jax.records.formats.registry import FORMATS
from diht_jax.storage import files, locks


def run(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
    overwrite: bool = False,
) -> Failures:
    """Does what is not done yet; arguments and errors as of `data_prep.filter.run_filter`."""
    folder = source_list.check_folder(config.output)
    inputs = source_list.list_inputs(config.input, config.source)
    source_list.check_not_input(folder, (found.shard for found in inputs))
    for step in active_steps(config):
        step.check_inputs(config, inputs)
    tasks = parts.plan_parts(config, inputs, folder, overwrite)
    del inputs  # the tasks have them
    mine = source_list.shards_of_task(tasks, task_index, num_tasks)
    done = parts.settle_changes(config, tasks, mine, folder, overwrite)
    failures = parts.filter_parts(config, mine, done, folder, engine)
    finish = functools.partial(_finish, config, tasks, mine, folder, engine)
    result, missing = finish(failures, done, has_begun=len(done) < len(mine))
    if missing:
        again = _filter_again(config, missing, mine, engine)
        if again:
            return Failures(print_failures(failures | again))
        result, missing = finish(failures, {}, has_begun=False)
    if missing:
        print(f"{len(missing)} shards are read again by other jobs; run the command again")
        error = "its records are missing"
        result = Failures(failures | {str(task.source): error for task in missing})
    return print_failures(result)


def _finish(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    mine: Sequence[shards.ShardTask],
    folder: str,
    engine: str,
    failures: Failures,
    known: Mapping[str, dict[str, Any]],
    *,
    has_begun: bool,
) -> tuple[Failures, list[shards.ShardTask]]:
    """Writes the output if all jobs are done and no other job has written it.

    Args:
        config: of the job.
        tasks, mine: of all jobs, and of this one.
        folder: of the output.
        engine: one of `engine.ENGINES`.
        failures: of this job.
        known: of `survey`.
        has_begun: whether this job had parts to filter.

    Returns:
        The failures to report, and the tasks that must be filtered again before there is output.
    """
    with locks.leader_lock(folder):
        if has_begun and (merged := parts.read_written(config, tasks, folder)) is not None:
            print(f"{folder}: another job has written the output")
            return with_output(failures, merged.get("failed", ())), []
        found = survey(tasks, known)
        if is_unfinished(config.max_failed_shards, found, len(tasks)):
            report_unfinished(config, found, folder, has_all=len(mine) == len(tasks))
            return failures, []
        not_made: dict[str, str] = {}
        if config.examples_per_shard is None:
            _describe_parts(config, found, folder)
        else:
            planned = plan_output(config, found.parts, folder)
            unwritten = _find_unwritten(planned)
            if missing := _records_missing(found.parts, unwritten, folder):
                return failures, missing
            not_made = _reshard(config, tasks, found, planned, unwritten, folder, engine)
        if not_made:
            return Failures(failures | not_made), []
        return with_output(failures, found.failed), []


def merge_parts(config: ml_collections.ConfigDict, found: Survey) -> Report:
    """The report of the parts that are done, at least one."""
    job = {
        "input": config.input,
        "output": config.output,
        "settings": filter_config.record_settings(config),
        "config_hash": found.parts[0][0].config_hash,
        "failed": found.failed,
        "shards": len(found.parts),
    }
    return gather(
        [task.output for task, _ in found.parts],
        [job],
        samples_per_outcome=config.samples_per_outcome,
        report_samples=config.report_samples,
        clean_label=config.clean_label,
    )


def report_unfinished(
    config: ml_collections.ConfigDict, found: Survey, folder: str, *, has_all: bool
) -> None:
    """Prints the funnel of the parts that are done, where no output can be written.

    Once no part is waited for, the report is written as well: it lists what has failed.

    Args:
        config: of the job.
        found: the parts; of none there is nothing to report.
        folder: of the output.
        has_all: whether this job has the parts of all jobs.
    """
    if not found.parts or (found.waiting and not has_all):
        return
    report = merge_parts(config, found)
    print_funnel(report)
    if not found.waiting:
        write_report(folder, report)
        print(f"what the shards that are done gave: {folder}/{PAGE}")


def print_funnel(report: Report) -> None:
    """The funnel, what img2dataset counted, and the filters against known noise."""
    if report["download"]:
        d = report["download"]
        print(
            f"img2dataset: {d['count']:,} rows, {d['successes']:,} downloaded, "
            f"{d['failed_to_download']:,} failed to download, {d['failed_to_resize']:,} to resize"
        )
    print(get_funnel(report).format_table())
    for warning in report["warnings"]:
        logging.warning("%s", warning)
    if report["measures"]["labels"]:
        print()
        print(format_noise_table(report["measures"]["labels"], report["clean_label"]))


def plan_output(
    config: ml_collections.ConfigDict, parts: Sequence[Part], folder: str
) -> Sequence[resharding.BalancedShard]:
    """The output shards that all parts together make."""
    return resharding.plan_shards(
        parts,
        folder,
        dataset=config.dataset_name,
        split=config.split,
        examples_per_shard=config.examples_per_shard,
        output_format=config.output_format,
    )


def _reshard(
    config: ml_collections.ConfigDict,
    tasks: Sequence[shards.ShardTask],
    found: Survey,
    planned: Sequence[resharding.BalancedShard],
    unwritten: Sequence[resharding.BalancedShard],
    folder: str,
    engine: str,
) -> dict[str, str]:
    """Makes the output shards of the parts; what could not be made, by source, comes back."""
    if unwritten or not _is_described(config, tasks, folder):
        failures = _write_output(config, found, planned, unwritten, folder, engine)
        if failures:
            return failures
    _show(folder, len(planned))
    reuse.remove_previous(folder)
    if not config.keep_parts:
        resharding.remove_records(parts.parts_folder(config, folder), tasks)
    return {}


def _filter_again(
    config: ml_collections.ConfigDict,
    missing: Sequence[shards.ShardTask],
    mine: Sequence[shards.ShardTask],
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
    return parts.run_filter(config, again, engine)


def _records_missing(
    found: Sequence[Part], unwritten: Sequence[resharding.BalancedShard], folder: str
) -> list[shards.ShardTask]:
    """Parts whose records are needed for an output shard, or for the lists, and are nowhere."""
    _, missing = reuse.find_records(found, unwritten, folder)
    if not files.exists(files.join(folder, lists.KEYS_FILE)):
        where = files.join(folder, resharding.PARTS)
        present = set(files.list_names(where, lambda name: name.endswith(table.SUFFIX)))
        for task, _ in found:
            if os.path.basename(task.output) + table.SUFFIX not in present:
                missing.add(task.output)
    return [task for task, _ in found if task.output in missing]


def _find_unwritten(
    planned: Sequence[resharding.BalancedShard],
) -> Sequence[resharding.BalancedShard]:
    written = resharding.load_written(planned)
    missing = (s for s, stats in zip(planned, written, strict=True) if stats is None)
    return PackedList(missing, per_block=1)


def _is_described(
    config: ml_collections.ConfigDict, tasks: Sequence[shards.ShardTask], folder: str
) -> bool:
    """Whether the files are there that describe the output of these parts as a whole."""
    described = _described_by(config)
    names = (shards.MERGED_STATS, REPORT, PAGE, *described)
    if not all(files.exists(files.join(folder, name)) for name in names):
        return False
    merged = shards.read_json(files.join(folder, shards.MERGED_STATS))
    return parts.layout(merged) == {"inputs": len(tasks)} | parts.layout(config)


def _described_by(config: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The files that describe the shards of a config to other programs."""
    if FORMATS[config.output_format].tfds_name is None:
        return (dataset_info.SIZES,)
    # To TFDS the shards of a data set are numbered.
    return () if config.examples_per_shard is None else dataset_info.FILES


def _write_output(
    config: ml_collections.ConfigDict,
    found: Survey,
    planned: Sequence[resharding.BalancedShard],
    unwritten: Sequence[resharding.BalancedShard],
    folder: str,
    engine: str,
) -> dict[str, str]:
    """Re-shards, then writes all that describes the whole folder."""
    report = _merge_some(config, found, folder)
    shards.remove_merged(folder)
    located, missing = reuse.find_records(found.parts, unwritten, folder)
    if missing:
        return dict.fromkeys(sorted(missing), "its records are missing; run the command again")
    located = reuse.move_aside(located, folder)
    resharding.remove_stale_shards(folder, planned, config.output_format)
    names = [os.path.basename(shard.output) for shard in planned]
    shards.remove_temporary_files(folder, [*names, *parts.MERGED_FILES])
    described = [filter_config.SETTINGS, manifest.NAME]
    shards.remove_temporary_files(files.join(folder, resharding.PARTS), described)
    lists.write_lists(folder, lists.read_kept(task.output for task, _ in found.parts))
    options = engine_options(config, engine) | {"label": "re-shard"}
    failures = run_pending(resharding.write_shard, located, **options)
    if failures:
        return failures
    outputs = [stats["output"] for stats in resharding.load_written(planned)]
    _describe_output(config, found, outputs, folder, report)
    return {}


def _describe_parts(config: ml_collections.ConfigDict, found: Survey, folder: str) -> None:
    """Writes all that describes a folder whose parts are the output."""
    # As training reads them, which is the order of their names.
    ordered = sorted(found.parts, key=lambda part: part[0].output)
    names = (shards.MERGED_STATS, REPORT, PAGE, lists.KEYS_FILE, *_described_by(config))
    if not all(files.exists(files.join(folder, name)) for name in names):
        report = _merge_some(config, found, folder)
        shards.remove_merged(folder)
        described = [filter_config.SETTINGS, manifest.NAME, *parts.MERGED_FILES]
        shards.remove_temporary_files(folder, described)
        lists.write_lists(folder, lists.read_kept(task.output for task, _ in ordered))
        outputs = [stats["output"] for _, stats in ordered]
        _describe_output(config, found, outputs, folder, report)
    _show(folder, len(ordered))


def _merge_some(config: ml_collections.ConfigDict, found: Survey, folder: str) -> Report:
    """The report of the parts.

    Raises:
        ValueError: no pair was kept.
    """
    report = merge_parts(config, found)
    if not report["counts"]["kept"]:
        print_funnel(report)
        write_report(folder, report)
        raise ValueError(
            f"none of the {report['counts']['read']} pairs of '{config.input}' was kept; the "
            f"reasons are in the table above, examples in {folder}/{PAGE}"
        )
    return report


def _describe_output(
    config: ml_collections.ConfigDict,
    found: Survey,
    outputs: Sequence[Mapping[str, Any]],
    folder: str,
    report: Report,
) -> None:
    """Writes report and index, what other programs need, and the merged statistics last.

    Args:
        config: of the job.
        found: the parts.
        outputs: "file", "records" and "bytes" of every output shard, in order.
        folder: of the output.
        report: of the parts.
    """
    write_report(folder, report)
    described = _described_by(config)
    if dataset_info.SIZES in described:
        dataset_info.write_sizes(folder, {output["file"]: output["records"] for output in outputs})
    elif described:
        dataset_info.write_dataset_info(
            folder,
            dataset=config.dataset_name,
            split=config.split,
            shard_lengths=[output["records"] for output in outputs],
            num_bytes=sum(output["bytes"] for output in outputs),
            image_formats=report["counts"]["image_formats"],
            description=f"Image-text pairs of {config.input}, by data_prep.filter.",
            file_format=FORMATS[config.output_format].tfds_name,
        )
    shards.write_index(folder, [files.join(folder, output["file"]) for output in outputs])
    merged = {
        "config": filter_config.record_settings(config),
        "input": config.input,
        "config_hash": found.parts[0][1]["config_hash"],
        "inputs": len(found.parts) + len(found.failed),
        "examples_per_shard": config.examples_per_shard,
        "output_format": config.output_format,
        "shards": len(outputs),
        "versions": report["versions"],
        "counts": report["counts"] | {"measures": report["measures"]},
    }
    if found.failed:
        merged["failed"] = found.failed
    shards.write_json(files.join(folder, shards.MERGED_STATS), merged)


def _show(folder: str, num_shards: int) -> None:
    report = read_report(folder)
    print_funnel(report)
    kept = report["counts"]["kept"]
    print(f"{kept:,} pairs in {num_shards} shards: {folder}; look at {folder}/{PAGE}")
