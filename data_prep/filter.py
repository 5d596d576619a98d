r"""Command: CAT-filter image-text pairs of any source into TFRecord shards.

    python -m data_prep.filter --config prep/cat \
        --config.input='/data/raw/*.tar' --config.output=/data/kept
    python -m data_prep.filter --explain "a black cat is chasing a small brown bird"
    python -m data_prep.filter --config prep/cat --config.min_complexity=2 \
        --replay=/data/kept

The same command resumes unfinished work. `--engine=ray` runs on a Ray cluster. For a job array, add
`--task_index=I --num_tasks=N`: every job filters its share of the shards, and the job that finds
all of them done writes the output shards and the report. Results of another config are replaced
only with `--overwrite`, and so are results of changed inputs if more of them changed than
`config.max_changed_shards` allows. `--replay` decides again from the decisions of a finished
folder, with the limits of the given config or else of the folder's own config, and reads no input.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from data_prep.decisions import table
from data_prep.decisions.report import REPORT, Report, gather, read_report
from data_prep.filtering import config as filter_config
from data_prep.filtering import plan, resharding
from data_prep.filtering.plan import Job
from data_prep.filtering.replay import Replay
from data_prep.filtering.rows import filter_rows
from data_prep.filtering.shard import filter_shard
from data_prep.jobs import shards
from data_prep.jobs.engine import ENGINES, print_failures, run_pending
from data_prep.jobs.failures import (
    Failures,
    Survey,
    is_unfinished,
    run_noting_failures,
    survey,
    with_output,
)
from data_prep.jobs.shards import ShardTask
from data_prep.reports.page import PAGE, format_funnel, format_noise_table, write_report
from data_prep.steps.cat import caption_limits, drops_captions
from data_prep.steps.registry import active_steps
from diht_jax import command_line
from diht_jax.config.checks import validate_config
from diht_jax.data.index import is_indexable, update_index
from diht_jax.records import dataset_info
from diht_jax.records.formats import FORMATS
from diht_jax.storage import files, locks
from diht_jax.terminal import print_escaped

_REMOVED = "what was made of it was removed, or it has changed, while the filter ran; run the "
_REMOVED += "command again"


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    config_flags.DEFINE_config_file("config", None, "Recipe: a name such as prep/cat, or a path.")
    flags.DEFINE_string("explain", None, "Print graph and decision for this caption.")
    flags.DEFINE_string("replay", None, "Finished folder: decide anew by the config, print funnel.")
    flags.DEFINE_string("lists", None, "Of --replay: folder for lists of kept and dropped keys.")
    flags.DEFINE_enum("engine", "local", ENGINES, "Local processes, or a Ray cluster.")
    flags.DEFINE_bool("overwrite", False, "Make again what has changed.")
    command_line.define_job_array_flags()


def main() -> None:
    """Filters, explains a caption or replays decisions, depending on the flags."""
    given = flags.FLAGS
    config = given.config if given.config is not None else filter_config.default_config()
    validate_config(config, filter_config.default_config())
    filter_config.check_config(config)
    if given.explain is not None:
        print_escaped(explain(given.explain, config))
        return
    if given.lists is not None and given.replay is None:
        raise ValueError(f"--lists='{given.lists}': expected with --replay=FOLDER only")
    if given.replay is not None:
        filter_config.set_quantile_limit(config)
        replay = Replay(given.replay, None if given.config is None else config)
        print_escaped(replay.run(given.lists).format_table())
        return
    if given.config is None:
        raise ValueError("--config is not set: expected a recipe such as prep/cat")
    failures = run_filter(
        config,
        given.task_index,
        given.num_tasks,
        engine=given.engine,
        overwrite=given.overwrite,
    )
    if failures:
        sys.exit(failures.exit_status)


def explain(caption: str, config: ml_collections.ConfigDict) -> str:
    """Formats the graph of a caption and the decision about it as text."""
    from data_prep.captions import format_graph, parse_captions

    graph = parse_captions([caption])[0]
    if not drops_captions(config):  # then the gates do not drop captions either
        graph = dataclasses.replace(graph, drop_reason=None)
    return format_graph(graph, **caption_limits(config))


def run_filter(
    config: ml_collections.ConfigDict,
    task_index: int = 0,
    num_tasks: int = 1,
    *,
    engine: str = "local",
    overwrite: bool = False,
) -> Failures:
    """Filters all unfinished input shards, and prints the funnel.

    Args:
        config: a valid config, as from `config.default_config`.
        task_index: index of this job.
        num_tasks: number of jobs that share the work.
        engine: one of `engine.ENGINES`.
        overwrite: replace results of another config, or of any number of other inputs.

    Returns:
        Failed sources with the reason, and whether the output was written without them; the other
        shards are complete.

    Raises:
        ValueError: there is no input, the output cannot be written, no pair was kept, or the config
            or more than a few inputs have changed and `overwrite` is not set.
    """
    if engine == "ray" and config.spotter.cache is not None:
        # An absolute path, because a worker may run in another folder.
        config.spotter.cache = os.path.abspath(config.spotter.cache)
    filter_config.set_quantile_limit(config)
    job = plan.plan_job(config, task_index, num_tasks, engine, overwrite)
    done, is_renewed = plan.find_done(job, overwrite)
    pending = [task for task in job.mine if task.output not in done]
    logging.info("%d shards, %d of them done before", len(job.mine), len(job.mine) - len(pending))
    if pending:
        shards.remove_merged(job.folder, plan.MERGED_FILES)
    names = [os.path.basename(task.output) for task in job.mine]
    shards.remove_temporary_files(job.parts_folder, names)
    shards.remove_temporary_files(files.join(job.folder, table.FOLDER), names)
    failures = filter_parts(job, pending)
    known = {**done, **failures.made}
    result, missing = _finish(job, failures, known, has_begun=bool(pending), is_renewed=is_renewed)
    if missing:
        logging.warning(
            "%d finished shards are read again, since records that were made from them are "
            "missing or damaged, such as those of %s",
            len(missing),
            missing[0].source,
        )
        again = filter_parts(job, missing)
        if again:  # the existing output may contain records that are unreadable now
            return print_failures(Failures(failures | again))
        result, missing = _finish(job, failures, {}, has_begun=False)
    result.update({str(task.source): _REMOVED for task in missing})
    return print_failures(result)


def filter_parts(job: Job, pending: Sequence[ShardTask]) -> Failures:
    """Filters input shards; failures are recorded next to their parts."""
    function = filter_rows if job.config.metadata_only else filter_shard
    work = functools.partial(function, config=job.config, steps=active_steps(job.config))
    return run_noting_failures(work, pending, job.config, job.engine, label="filter")


def _finish(
    job: Job,
    failures: Failures,
    known: Mapping[str, dict[str, Any]],
    *,
    has_begun: bool,
    is_renewed: bool = False,
) -> tuple[Failures, list[ShardTask]]:
    """Writes the output if all jobs are done and no other job is writing it.

    Args:
        job: this job, after all of its tasks have run.
        failures: failures of this job.
        known: output path -> statistics that were already read.
        has_begun: whether this job had parts to filter.
        is_renewed: from `plan.find_done`.

    Returns:
        The failures to report, and the tasks to filter again before the output can be written.
    """
    with locks.leader_lock(job.folder):
        # This job has removed old merged statistics if it had parts to filter.
        if has_begun and (merged := plan.read_written(job)) is not None:
            print_escaped(f"{job.folder}: another job has written the output")
            return with_output(failures, merged.get("failed", ())), []
        found = survey(job.tasks, known)
        is_alone = len(job.mine) == len(job.tasks)
        if is_unfinished(
            job.config.max_failed_shards, found, len(job.tasks), has_other_jobs=not is_alone
        ):
            outputs = [task.output for task, _ in found.parts]
            undecided = plan.find_undecided(outputs)
            if found.parts and not undecided and (is_alone or not found.waiting):
                report = _gather(job, found, outputs)
                print_funnel(report)
                if not found.waiting:  # the report lists the failures
                    write_report(job.folder, report)
                    print_escaped(f"what the shards that are done gave: {job.folder}/{PAGE}")
            # Otherwise, the job with the changed inputs may not have started yet.
            changed = found.explain_changed() if has_begun and not is_renewed else {}
            gone = undecided | {task.output for task in found.waiting}
            removed = {str(task.source): _REMOVED for task in job.mine if task.output in gone}
            return Failures(changed | removed | failures), []
        not_made, missing = _write_output(job, found)
        if missing or not_made:
            return Failures(failures | not_made), missing
        return with_output(failures, found.failed), []


def _write_output(job: Job, found: Survey) -> tuple[dict[str, str], list[ShardTask]]:
    """Writes the output shards that do not exist yet, and the files that describe the output.

    Returns:
        Output shards that failed, with the reason; and the parts to filter again because some of
        their records are lost.
    """
    config, folder, parts = job.config, job.folder, found.parts
    outputs = [task.output for task, _ in parts]
    planned = resharding.plan_shards(parts, folder, config) if job.is_resharded else []
    written = resharding.load_written(planned)
    unwritten = [shard for shard, stats in zip(planned, written, strict=True) if not stats]
    if unwritten or not _is_described(job):
        restored: list[resharding.BalancedShard] = []
        if job.is_resharded:
            restored, missing = resharding.plan_restoring(parts, unwritten, folder)
            missing |= plan.find_undecided(outputs)
            if missing:
                return {}, [task for task, _ in parts if task.output in missing]
        else:  # ordered by name, as training and replays read them
            parts = sorted(parts, key=lambda part: part[0].output)
        report = _gather(job, found, outputs)
        if not report["counts"]["kept"] and not config.metadata_only:
            print_funnel(report)
            write_report(folder, report)
            raise ValueError(
                f"none of the {report['counts']['read']} pairs of '{config.input}' was kept; the "
                f"reasons are in the table above, examples in {folder}/{PAGE}"
            )
        shards.remove_merged(folder, plan.MERGED_FILES)
        failures = run_pending(
            resharding.copy_records, restored, config, job.engine, label="restore"
        )
        if failures:
            return failures, []
        if job.is_resharded:
            resharding.remove_stale_shards(folder, planned, config.output_format)
        names = [os.path.basename(shard.output) for shard in planned]
        shards.remove_temporary_files(folder, [*names, *plan.MERGED_FILES])
        described = [filter_config.SETTINGS, table.MANIFEST]
        shards.remove_temporary_files(job.parts_folder, described)
        table.write_lists(folder, table.read_kept(task.output for task, _ in parts))
        failures = run_pending(
            resharding.write_shard, unwritten, config, job.engine, label="re-shard"
        )
        if failures:
            return failures, []
        made = list(resharding.load_written(planned)) or [stats for _, stats in parts]
        _describe_output(job, found, [stats["output"] for stats in made], report)
    report = read_report(folder)
    print_funnel(report)
    unit, shard = ("rows", "files") if config.metadata_only else ("pairs", "shards")
    print_escaped(
        f"{report['counts']['kept']:,} {unit} in {len(planned or parts)} {shard}: {folder}; look "
        f"at {folder}/{PAGE}"
    )
    if job.is_resharded and not config.keep_parts:
        resharding.remove_records(job.parts_folder, job.tasks)
    return {}, []


def _is_described(job: Job) -> bool:
    """Returns whether all files that describe the output of the current parts exist."""
    merged = plan.read_written(job)
    if merged is None or "described_by" not in merged:
        return False
    report = files.read_object(files.join(job.folder, REPORT)) or {}
    if report.get("clean_label") != job.config.clean_label:
        return False
    return all(files.exists(files.join(job.folder, name)) for name in merged["described_by"])


def _gather(job: Job, found: Survey, outputs: Sequence[str]) -> Report:
    """Makes the report of the finished parts, at least one, from their output paths."""
    described = {
        "input": job.config.input,
        "output": job.config.output,
        "settings": filter_config.record_settings(job.config),
        "config_hash": job.tasks[0].config_hash,
        "failed": found.failed,
        "shards": len(outputs),
    }
    return gather(
        outputs,
        [described],
        samples_per_outcome=job.config.samples_per_outcome,
        report_samples=job.config.report_samples,
        clean_label=job.config.clean_label,
    )


def _describe_output(
    job: Job, found: Survey, outputs: Sequence[Mapping[str, Any]], report: Report
) -> None:
    """Writes report, index and files for other programs, and the merged statistics last."""
    config, folder = job.config, job.folder
    write_report(folder, report)
    if not config.metadata_only:
        tfds_name = FORMATS[config.output_format].tfds_name
        if tfds_name is None:
            dataset_info.write_sizes(folder, {each["file"]: each["records"] for each in outputs})
        elif job.is_resharded:  # TFDS requires numbered shards
            dataset_info.write_dataset_info(
                folder,
                dataset=config.dataset_name,
                split=config.split,
                shard_lengths=[output["records"] for output in outputs],
                num_bytes=sum(output["bytes"] for output in outputs),
                image_formats=report["counts"]["image_formats"],
                description=f"Image-text pairs of {config.input}, by data_prep.filter.",
                file_format=tfds_name,
            )
        if all(is_indexable(files.join(folder, output["file"])) for output in outputs):
            update_index(folder)
    merged = {
        "config": filter_config.record_settings(config),
        "input": config.input,
        "config_hash": job.tasks[0].config_hash,
        "output_id": job.output_id,
        "inputs": len(job.tasks),
        "examples_per_shard": config.examples_per_shard,
        "output_format": config.output_format,
        "shards": len(outputs),
        "described_by": [
            name for name in plan.MERGED_FILES if files.exists(files.join(folder, name))
        ],
        "versions": report["versions"],
        "counts": report["counts"] | {"measures": report["measures"]},
    }
    if found.failed:
        merged["failed"] = found.failed
    files.write_object(files.join(folder, shards.MERGED_STATS), merged, with_checksum=True)


def print_funnel(report: Report) -> None:
    """Prints the funnel, the counts of img2dataset, and the accuracy against known noise."""
    if d := report["download"]:
        print_escaped(
            f"img2dataset: {d['count']:,} rows, {d['successes']:,} downloaded, "
            f"{d['failed_to_download']:,} failed to download, {d['failed_to_resize']:,} to resize"
        )
    print_escaped(format_funnel(report["funnel"], report["counts"]["text_spotting"]))
    for warning in report["warnings"]:
        logging.warning("%s", warning)
    if report["measures"]["labels"]:
        print_escaped()
        print_escaped(format_noise_table(report["measures"]["labels"], report["clean_label"]))


if __name__ == "__main__":
    define_flags()
    command_line.run(
        main,
        config_defaults=filter_config.default_config,
        optional_keys=filter_config.OPTIONAL_KEYS,
        comment_files=filter_config.COMMENT_FILES,
    )
