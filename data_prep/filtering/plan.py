"""Plan of a filter job: the parts of its inputs, and which are finished, stale, or unexpected.

A part is the filtered form of one input shard, named after its input. The output folder contains:

    parts/         filtered input shards: records (removed at the end), decisions, statistics,
                   samples and times; with config.examples_per_shard=None, the parts are in the
                   output folder itself, and are the output
    *.tfrecord     the records of all parts, in shards of equal size (`resharding`); or
                   *.array_record or *.tar, as config.output_format has it
    dataset.index  where the records of all shards are (`diht_jax.data.index`)
    stats.json, report.json, report.html, kept_keys.txt, kept_uids.npy
    dataset_info.json, features.json; for tars sizes.json

With config.metadata_only, rows of tables are filtered without images: the kept rows of
`INPUT.parquet` are in `OUTPUT/INPUT.parquet` (`rows`).

Results of other settings, or of many other inputs, are replaced only with `--overwrite`.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep import sources
from data_prep.decisions import table
from data_prep.decisions.log import SAMPLES_SUFFIX
from data_prep.decisions.report import REPORT
from data_prep.filtering import config as filter_config
from data_prep.filtering import resharding, rows
from data_prep.filtering.config import SETTINGS
from data_prep.jobs import shards
from data_prep.jobs.failures import allowed_number, damaged_outputs
from data_prep.jobs.shards import FAILED_SUFFIX, STATS_SUFFIX, ShardTask
from data_prep.reports.page import PAGE
from data_prep.sources import Input, hash_inputs
from data_prep.steps.registry import active_steps, ordered_steps
from diht_jax.readers.base import SourceShard
from diht_jax.records.shard_files import SUFFIXES
from diht_jax.storage import files

# Files that describe the whole output.
MERGED_FILES = (*shards.MERGED_FILES, table.KEYS_FILE, table.UIDS_FILE, REPORT, PAGE)

_SHOWN = 4  # differences listed in an error


@dataclasses.dataclass(frozen=True)
class Job:
    """A filter job, or one job of an array.

    Attributes:
        tasks: the parts of all jobs, in the order of the inputs.
        mine: the parts of this job.
        engine: one of `engine.ENGINES`.
    """

    config: ml_collections.ConfigDict
    folder: str
    parts_folder: str
    tasks: Sequence[ShardTask]
    mine: Sequence[ShardTask]
    engine: str

    @property
    def is_resharded(self) -> bool:
        """Whether the parts are written again as output shards of equal size."""
        return self.parts_folder != self.folder

    @property
    def output_id(self) -> str:
        """Hash of everything that determines the contents of the output and its division."""
        return shards.hash_config(
            {
                "config": self.tasks[0].config_hash,
                "examples_per_shard": self.config.examples_per_shard,
                "output_format": self.config.output_format,
                "parts": [os.path.basename(task.output) for task in self.tasks],
            }
        )


def plan_job(
    config: ml_collections.ConfigDict,
    task_index: int,
    num_tasks: int,
    engine: str,
    overwrite: bool,
) -> Job:
    """Lists the inputs, assigns a part to each, and makes the folders.

    Raises:
        ValueError: there is no input, the output cannot be written, or the folder has shards of
            other programs or another layout, and `overwrite` is not set.
    """
    folder = parts_folder = sources.check_folder(config.output)
    if config.metadata_only:
        units, names = _plan_tables(config, folder)
    else:
        inputs = sources.list_inputs(config.input, config.source)
        units = [found.shard for found in inputs]
        sources.check_not_input(folder, units)
        for step in active_steps(config):
            step.check_inputs(config, inputs)
        files.make_folder(folder)
        _settle_layout(config, folder, overwrite)
        sources.refuse_foreign(folder, resharding.find_foreign(folder, config))
        if config.examples_per_shard is not None:
            parts_folder = files.join(folder, resharding.PARTS)
        names = _plan_parts(config, inputs, parts_folder, is_output=parts_folder == folder)
    config_hash = shards.hash_config(filter_config.describe_settings(config))
    tasks = [
        ShardTask(unit, files.join(parts_folder, name), config_hash, config.input_identity)
        for unit, name in zip(units, names, strict=True)
    ]
    return Job(config, folder, parts_folder, tasks, tasks[task_index::num_tasks], engine)


def _plan_parts(
    config: ml_collections.ConfigDict, inputs: Sequence[Input], folder: str, *, is_output: bool
) -> list[str]:
    """Names the part of every input, and writes the manifest.

    A name depends only on its input, so adding, removing or replacing other inputs does not matter.
    """
    files.make_folder(folder)
    suffix = SUFFIXES[config.output_format if is_output else "tfrecord"]
    prefix = resharding.name_prefix(config)
    names, entries = [], []
    for digest, found in zip(hash_inputs(inputs), inputs, strict=True):
        name, shard = f"{prefix}{digest}{suffix}", found.shard
        names.append(name)
        entry = {"name": name, "path": found.path, "source": shard.path}
        entries.append(entry | {"kind": shard.kind, "start": shard.start, "stop": shard.stop})
    if table.read_manifest(folder) != entries:
        path = files.join(folder, table.MANIFEST)
        files.write_object(path, {"parts": entries}, with_checksum=True)
    return names


def _plan_tables(
    config: ml_collections.ConfigDict, folder: str
) -> tuple[list[SourceShard], list[str]]:
    """Returns the units of a metadata-only job, and the names of the filtered tables."""
    defaults = filter_config.default_config()
    asked = [
        step
        for step in ordered_steps()
        if "image" in step.reads and step.is_active(config) and not step.is_active(defaults)
    ]
    if config.text_spotting or config.concepts or asked:
        sections = "".join(f", and leave out config.{s.section or s.name}" for s in asked)
        raise ValueError(
            "config.metadata_only reads no images: set config.text_spotting=False and "
            f"config.concepts=False, as --config prep/metadata does{sections}"
        )
    units = rows.list_units(config.input, config.source)
    if not units:
        raise ValueError(f"config.input='{config.input}': the tables have no rows")
    sources.check_not_input(folder, units)
    names, present = rows.name_outputs(units), set(files.list_names(folder))
    if SETTINGS not in present:  # else an earlier run has begun to write these tables
        foreign = [n for n in names if n in present and n + STATS_SUFFIX not in present]
        sources.refuse_foreign(folder, foreign)
    files.make_folder(folder)
    return units, names


def find_done(job: Job, overwrite: bool) -> tuple[dict[str, dict[str, Any]], bool]:
    """Finds which of this job's parts are finished, and removes stale parts.

    Parts of missing or replaced inputs are removed if they are few. Parts of another config, model
    or rules are removed with `overwrite`. The statistics of each task are read once; those of other
    jobs are read only if something of this job has changed.

    Returns:
        The statistics of finished parts, by output, without counts; and whether an output is
        renewed: it was complete, or something of this job has changed. Then other jobs may not have
        found the changes of their own inputs yet.

    Raises:
        ValueError: something has changed, and `overwrite` is not set.
    """
    listed = files.list_names(job.parts_folder, (STATS_SUFFIX, FAILED_SUFFIX))
    present = {name for name in listed if not name.startswith(".")}
    done, changed = _compare(job, present) if present else ({}, {})
    names = {os.path.basename(task.output) for task in job.tasks} if present else set()
    finished = {n.removesuffix(STATS_SUFFIX) for n in present if n.endswith(STATS_SUFFIX)}
    gone = sorted(finished - names)
    if (changed or gone) and not overwrite:
        _refuse_many(job, changed, gone, len(finished))
    for path, (reason, _) in changed.items():
        logging.warning("%s: made again, since this changed: %s", path, reason)
    for name in gone:
        path = files.join(job.parts_folder, name)
        logging.warning("%s: removed, since %s is gone", path, _input_of(path) or "its input")
    notes = {n.removesuffix(FAILED_SUFFIX) for n in present if n.endswith(FAILED_SUFFIX)}
    removed = {*map(os.path.basename, changed), *gone, *(notes - names)}
    if removed:
        resharding.remove_outputs(job.parts_folder, removed)
    was_complete = files.exists(files.join(job.folder, shards.MERGED_STATS))
    is_renewed = was_complete or bool(changed or gone)
    if changed or gone:
        shards.remove_merged(job.folder, MERGED_FILES)
    settings = filter_config.describe_settings(job.config)
    path = files.join(job.parts_folder, SETTINGS)
    if (files.read_object(path) or {}) != settings:
        files.write_object(path, settings)
    damaged = find_undecided(done)
    if not job.is_resharded:  # there is no other copy of these outputs
        damaged |= damaged_outputs(
            [(task, done[task.output]) for task in job.mine if task.output in done]
        )
    elif done and not overwrite:
        _check_records(job, done)
    for path in damaged:
        del done[path]
    return done, is_renewed


def find_undecided(outputs: Iterable[str]) -> set[str]:
    """Returns the outputs whose decisions or samples are missing."""
    present: dict[str, set[str]] = {}  # folder -> names
    undecided = set()
    for output in outputs:
        for path in (table.decisions_path(output), output + SAMPLES_SUFFIX):
            folder, _, name = path.rpartition("/")
            if folder not in present:
                present[folder] = set(files.list_names(folder))
            if name not in present[folder]:
                undecided.add(output)
    return undecided


def read_written(job: Job) -> dict[str, Any] | None:
    """Reads the merged statistics; returns None if they are missing, or of other parts."""
    merged = files.read_object(files.join(job.folder, shards.MERGED_STATS))
    if merged is None or merged.get("output_id") != job.output_id:
        return None
    failed = files.list_names(job.parts_folder, FAILED_SUFFIX)
    return merged if len(failed) == len(merged.get("failed", ())) else None


# Output -> why a finished part is stale, and whether only its input has changed.
_Changes = dict[str, tuple[str, bool]]


def _compare(job: Job, present: set[str]) -> tuple[dict[str, dict[str, Any]], _Changes]:
    """Returns the statistics (without counts) of this job's finished parts, and its stale parts."""
    versions = filter_config.package_versions(job.config)
    there = [task for task in job.mine if os.path.basename(task.stats_path) in present]
    done, changed = {}, {}
    for task, stats, change in shards.check_all(there):
        if stats is None:
            continue
        is_input = stats.get("config_hash") == task.config_hash
        before = stats.get("counts", {}).get("versions", {})
        for name in filter_config.DECIDING_PACKAGES:
            if name in before and name in versions and before[name] != versions[name]:
                is_input = False
                change = change or f"{name} ({before[name]}, now {versions[name]})"
        if change is None:
            done[task.output] = shards.trim_stats(stats)
        else:
            changed[task.output] = change, is_input
    return done, changed


def _refuse_many(job: Job, changed: _Changes, gone: Sequence[str], finished: int) -> None:
    """Raises ValueError if more has changed than a job may replace by itself.

    Each job of an array removes its own stale parts; the limit applies to all jobs together.
    """
    limit = job.config.max_changed_shards
    allowed = allowed_number(limit, finished)
    are_inputs = all(is_input for _, is_input in changed.values())
    spare, elsewhere = allowed - len(gone) - len(changed), 0
    if are_inputs and changed and spare >= 0:
        own = {task.output for task in job.mine}
        others = shards.check_all([task for task in job.tasks if task.output not in own])
        theirs = (stats for _, stats, reason in others if stats is not None and reason is not None)
        elsewhere = sum(1 for _ in itertools.islice(theirs, spare + 1))
    if are_inputs and elsewhere <= spare:
        return
    text = _describe_changes(job, changed, gone, finished)
    if (changed and are_inputs) or gone:
        text += (
            f"; config.max_changed_shards={limit:g} allows {allowed} inputs to be gone or "
            "replaced without it"
        )
    if elsewhere:
        text += f", and at least {elsewhere} of the other jobs of this array are replaced too"
    raise ValueError(text)


def _describe_changes(job: Job, changed: _Changes, gone: Sequence[str], finished: int) -> str:
    """Describes what has changed, and the cost of `--overwrite`."""
    texts = []
    if changed:
        reasons = list(dict.fromkeys(reason for reason, _ in changed.values()))
        text = f"'{job.parts_folder}' holds {len(changed)} shards that were made before this "
        text += f"changed: {'; '.join(reasons[:_SHOWN])}"
        if len(reasons) > _SHOWN:
            text += f"; and {len(reasons) - _SHOWN} more"
        before = files.read_object(files.join(job.parts_folder, SETTINGS)) or {}
        now = filter_config.describe_settings(job.config)
        differences = list(filter_config.compare_settings(before, now))
        if differences:
            text += f". In the config: {', '.join(differences[:_SHOWN])}"
        texts.append(text)
    if gone:
        inputs = [_input_of(files.join(job.parts_folder, name)) for name in gone[:_SHOWN]]
        named = ", ".join(f"'{path}'" for path in inputs if path)
        texts.append(
            f"'{job.parts_folder}' holds {len(gone)} shards whose inputs config.input no longer "
            "names" + (f", such as {named}" if named else "")
        )
    kept = finished - len(changed) - len(gone)
    return (
        f"{'. '.join(texts)}. Choose another output, or make it right with --overwrite: "
        f"{len(changed)} are made again, {len(gone)} removed, and {kept} stay"
    )


def _input_of(output: str) -> str | None:
    return (files.read_object(output + shards.LOCATION_SUFFIX) or {}).get("path")


def _check_records(job: Job, done: Mapping[str, Any]) -> None:
    """Raises if finished inputs would be read again because their records are only in tars.

    Records of other formats can be restored from the output, see `resharding`.
    """
    merged = files.read_object(files.join(job.folder, shards.MERGED_STATS)) or {}
    if merged.get("output_id") == job.output_id or merged.get("output_format") != "webdataset":
        return
    present = set(files.list_names(job.parts_folder))
    lost = [output for output in done if os.path.basename(output) not in present]
    if lost:
        raise ValueError(
            f"'{job.folder}' is complete, and its inputs, config.examples_per_shard or "
            f"config.output_format have changed: {len(lost)} input shards would have to be read "
            "again, since records cannot be copied out of tars. Choose another output, or make it "
            "again with --overwrite; config.keep_parts=True would have kept what is needed"
        )


def _settle_layout(config: ml_collections.ConfigDict, folder: str, overwrite: bool) -> None:
    """Raises if the folder was made with resharding and the config is without, or vice versa.

    With `overwrite`, removes the old files instead.
    """
    are_output = config.examples_per_shard is None
    other = files.join(folder, resharding.PARTS) if are_output else folder
    if not files.exists(files.join(other, SETTINGS)):
        return
    if not overwrite:
        before = "a number" if are_output else "None"
        raise ValueError(
            f"'{folder}' was made with config.examples_per_shard={before}, now it is "
            f"{config.examples_per_shard}: all input shards would have to be filtered again. "
            "Choose another output, or make it again with --overwrite"
        )
    shards.remove_merged(folder, MERGED_FILES)
    if are_output:
        resharding.remove_stale_shards(folder, [], config.output_format)
        stale = files.list_names(other)
    else:
        names = [entry["name"] for entry in table.read_manifest(folder)]
        stale = shards.names_below(files.list_names(folder), names) + [table.MANIFEST, SETTINGS]
    # The settings are removed last: they identify the folder if the job is killed.
    for name in sorted(stale, key=lambda name: name == SETTINGS):
        files.remove(files.join(other, name))
