"""A whole job on metadata alone: rows of parquet or jsonl in, the kept rows and a report out.

It runs where `config.metadata_only` is set: C and A need no images, so that a list of URLs can be
filtered before anybody downloads them (DiHT, arXiv 2301.02280, "Complexity, Action, and
Text-spotting"; the order is ours). Rows are written as they came: the same columns and types in
parquet, the same bytes in jsonl. What decides about a row belongs in `steps`.

The kept rows of `INPUT.parquet` are `OUTPUT/INPUT.parquet`; beside them lie stats.json,
report.json, report.html, kept_keys.txt and kept_uids.npy.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.filtering import config as filter_config
from data_prep.filtering import decisions, stale_outputs
from data_prep.filtering import job as filter_job
from data_prep.filtering import parts as filter_parts
from data_prep.filtering.shard_log import ShardLog
from data_prep.filtering.steps import registry
from data_prep.filtering.steps.base import Candidate, Drop, Step, begin
from data_prep.jobs import files, fingerprint, shards
from data_prep.jobs.crash_search import (
    BATCH,
    PAIR,
    CrashSearch,
    WorkRecord,
    after_death,
    without_crashed,
)
from data_prep.jobs.engine import Report, engine_options, print_failures
from data_prep.jobs.failures import Survey, is_unfinished, run_noting_failures, survey, with_output
from data_prep.reports.merging import GROUPS
from data_prep.reports.page import PAGE, write_report
from data_prep.sources import list as source_list
from diht_jax.data.readers.base import (
    Skipped,
    SourceShard,
    clean_text,
    parse_json_object,
    pick_captions,
)
from diht_jax.data.readers.parquet import explain_errors, open_parquet
from diht_jax.data.readers.registry import list_shards
from diht_jax.data.records.schema import Pair
from diht_jax.data.stores import is_remote, open_file

JSONL_SUFFIX = ".jsonl"

_PARQUET = "parquet"  # the kind of its shards

_BATCH_ROWS = 2048
# Of a parquet file in a store a unit has so many bytes at least: every unit reads the footer, too.
_STORE_UNIT_BYTES = 2**26
_WRITTEN_ROWS = 2**16  # of a row group


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
    units = list_units(config.input, config.source)
    if not units:
        raise ValueError(f"config.input='{config.input}': the tables have no rows")
    folder = source_list.check_output(config.output, units)
    files.make_folder(folder)
    settings = filter_config.describe_settings(config)
    config_hash = filter_config.hash_settings(settings)
    names = name_outputs(units)
    tasks = [
        shards.ShardTask(unit, files.join(folder, name), config_hash, config.input_identity)
        for unit, name in zip(units, names, strict=True)
    ]
    mine = source_list.shards_of_task(tasks, task_index, num_tasks)
    versions = filter_config.package_versions(config)
    finished = stale_outputs.reject_or_remove_stale(
        mine,
        names,
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
        for where in (folder, files.join(folder, decisions.FOLDER)):
            files.make_folder(where)
            shards.remove_temporary_files(where, names)
    function = functools.partial(filter_rows, config=config, steps=registry.active_steps(config))
    options = engine_options(config, engine)
    options |= {"label": "filter", "after_death": after_death}
    failures = run_noting_failures(function, pending, options)
    found = survey(tasks, done)
    if not is_unfinished(config.max_failed_shards, found, len(tasks)):
        _finish(config, found, folder, engine)
        failures = with_output(failures, found.failed)
    elif num_tasks == 1 and found.parts:
        filter_job.print_funnel(filter_job.merge_parts(config, found, engine))
    return print_failures(failures)


def _finish(config: ml_collections.ConfigDict, found: Survey, folder: str, engine: str) -> None:
    """Prints the funnel, and writes what describes the whole folder."""
    tasks = [task for task, _ in found.parts]
    report = filter_job.merge_parts(config, found, engine)
    filter_job.print_funnel(report)
    merged_path = files.join(folder, shards.MERGED_STATS)
    if not files.exists(merged_path):
        described = [*filter_parts.MERGED_FILES, stale_outputs.SETTINGS, GROUPS]
        shards.remove_temporary_files(folder, described)
        filter_job.write_lists(config, [task.output for task in tasks], folder, engine)
        write_report(folder, report)
        counts = report.funnel.to_json() | {"measures": report.measures.to_json()}
        merged = {
            "config": filter_config.record_settings(config),
            "input": config.input,
            "config_hash": tasks[0].config_hash,
            "inputs": len(tasks) + len(found.failed),
            "versions": report.versions_json(),
            "counts": counts,
        }
        if found.failed:
            merged["failed"] = found.failed
        shards.write_json(merged_path, merged)
    print(f"{report.funnel.kept:,} rows in {len(tasks)} files: {folder}; look at {folder}/{PAGE}")


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
            if unit.kind == _PARQUET:
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


def filter_rows(
    task: shards.ShardTask,
    report: Report,
    *,
    config: ml_collections.ConfigDict,
    steps: Sequence[type[Step]],
) -> dict[str, Any]:
    """Does one task: filters the rows of one unit.

    Args:
        task: a unit of `list_units`, and the file that its kept rows go to.
        report: called with the number of rows that are done, now and then.
        config: of `config.default_config`.
        steps: of `steps.registry.active_steps`.

    Returns:
        The statistics of the unit.

    Raises:
        ValueError: the input is damaged.
    """
    files.remove(task.stats_path)
    described = fingerprint.describe(task.source, task.identity)
    log = ShardLog(config)
    filter_table = _filter_parquet if task.source.kind == _PARQUET else _filter_jsonl
    if task.search is not None:  # workers have died of this unit, and left half-written files
        folder, name = os.path.split(task.output)
        shards.remove_temporary_files(folder, [name])
    with WorkRecord(task.output, task.search) as work, files.local_output(task.output) as path:
        rows = RowFilter(task.source, config, steps, log, task.search or CrashSearch(), work)
        filter_table(task.source, path, rows, report)
        rows.finish()
    counts = log.write(task.output)
    return shards.finish_task(task, described, counts, log.funnel.kept)


class RowFilter:
    """Takes the rows of a unit through the steps that need no image, and records what happened."""

    def __init__(
        self,
        source: SourceShard,
        config: ml_collections.ConfigDict,
        steps: Sequence[type[Step]],
        log: ShardLog,
        search: CrashSearch,
        work: WorkRecord,
    ):
        """Reads nothing yet.

        Args:
            source: the unit.
            config: of `config.default_config`.
            steps: of `steps.registry.active_steps`.
            log: gets what happens to every row.
            search: for rows that end their worker.
            work: gets the batch that is worked on.
        """
        self._search, self._work, self._row = search, work, 0
        self._stem = clean_text(pathlib.Path(source.path).stem)
        self._number = source.options.get("first_row", 0)
        # A table that states options of its own has them in its units.
        self._columns = {
            name: source.options.get(name, config.source[name])
            for name in ("caption_column", "key_column")
        }
        self._log = log
        with log.clock("loading"):
            self._steps = [step(config, source) for step in steps]
        self._open_steps = lambda: [step(config, source) for step in steps]
        self._reads_all = any("metadata" in step.reads for step in steps)
        self._fields = [*self._columns.values(), "key", "uid", config.label_field]

    def filter(self, rows: Sequence[dict[str, Any] | str]) -> list[bool]:
        """Whether each row is kept.

        Args:
            rows: in order; a text explains what is wrong with a row that could not be read.
        """
        batch = self._row, self._row + len(rows)
        self._row += len(rows)
        pairs = (self._make_pair(row) for row in rows)
        entries = list(without_crashed(pairs, self._search.crashed, batch[0]))
        if self._search.suspects == batch:
            self._try_one_by_one(entries, batch[0])
        self._work.write(BATCH, *batch)
        kept = []
        good = [entry for entry in entries if isinstance(entry, Pair)]
        remaining = iter(self._judge(good, self._steps))
        # All is recorded in the order of the rows.
        for entry in entries:
            name, outcome = (None, None) if isinstance(entry, Skipped) else next(remaining)
            if outcome is None:
                self._log.skip(entry)
            elif isinstance(outcome, Drop):
                self._log.drop_candidate(name, outcome)
            else:
                self._log.keep(outcome, written=entry)
            kept.append(isinstance(outcome, Candidate))
        return kept

    def _judge(
        self, pairs: Sequence[Pair], steps: Sequence[Step]
    ) -> list[tuple[str, Candidate | Drop]]:
        """What became of each pair, and the name of the last step that saw it."""
        outcomes: list[tuple[str, Candidate | Drop]] = [("", c) for c in begin(pairs)]
        for step in steps:
            going = [i for i, (_, found) in enumerate(outcomes) if isinstance(found, Candidate)]
            with self._log.clock(step.timer or step.name):
                results = list(step.judge([outcomes[i][1] for i in going]))
            for i, result in zip(going, results, strict=True):
                outcomes[i] = step.name, result
        return outcomes

    def _try_one_by_one(self, entries: Sequence[Pair | Skipped], first: int) -> None:
        """Does to each pair alone what is done to a batch, and keeps nothing: it may be the end."""
        steps = self._open_steps()
        for number, entry in enumerate(entries, first):
            if isinstance(entry, Pair):
                self._work.write(PAIR, number, number + 1)
                self._judge([entry], steps)

    def wants(self, column: str) -> bool:
        """Whether a column is read; of a step that reads the metadata every one is."""
        return self._reads_all or column in self._fields

    def finish(self) -> None:
        """Records what the steps counted, once all rows are done."""
        for step in self._steps:
            step.record(self._log)

    def _make_pair(self, row: dict[str, Any] | str) -> Pair | Skipped:
        default_key = f"{self._stem}-{self._number:08d}"
        self._number += 1
        if isinstance(row, str):
            return Skipped(default_key, "bad_row", row)
        names = (self._columns["key_column"], "key", "uid")
        values = (row.get(name) for name in names if name is not None)
        key = next((clean_text(str(v)) for v in values if v not in (None, "")), "") or default_key
        captions = pick_captions(row.get(self._columns["caption_column"]))
        if not captions:
            return Skipped(key, "no_caption", "")
        return Pair(key, b"", captions[0], {**row, "captions": captions})


def _filter_parquet(
    source: SourceShard, path: pathlib.Path, rows: RowFilter, report: Report
) -> None:
    import pyarrow
    import pyarrow.parquet

    file = open_parquet(source.path, (source.start, source.stop))
    schema = file.schema_arrow
    wanted = [name for name in schema.names if rows.wants(name)]
    compression = _compression(file)
    with pyarrow.parquet.ParquetWriter(path, schema, compression=compression) as writer:
        waiting: list[Any] = []
        with explain_errors(source.path, lambda: "damaged"):
            for batch in file.iter_batches(_BATCH_ROWS, range(source.start, source.stop)):
                kept = rows.filter(batch.select(wanted).to_pylist())
                waiting.append(batch.filter(pyarrow.array(kept, pyarrow.bool_())))
                if sum(part.num_rows for part in waiting) >= _WRITTEN_ROWS:
                    writer.write_table(pyarrow.Table.from_batches(waiting, schema))
                    waiting = []
                report(batch.num_rows)
        if waiting:
            writer.write_table(pyarrow.Table.from_batches(waiting, schema))


def _compression(file: Any) -> str:
    """That of the first column; parquet allows one for each, but writers hardly use that."""
    metadata = file.metadata
    if not metadata.num_row_groups or not metadata.num_columns:
        return "snappy"
    name = metadata.row_group(0).column(0).compression.lower()
    return "none" if name == "uncompressed" else name


def _filter_jsonl(source: SourceShard, path: pathlib.Path, rows: RowFilter, report: Report) -> None:
    remaining = _read_lines(source)
    with open(path, "xb") as output:
        while lines := list(itertools.islice(remaining, _BATCH_ROWS)):
            kept = rows.filter([_parse_line(line) for line in lines])
            output.writelines(line for line, is_kept in zip(lines, kept, strict=True) if is_kept)
            report(len(lines))


def _read_lines(source: SourceShard) -> Iterator[bytes]:
    """The lines of a range that are not blank, each with a line break."""
    with open_file(source.path) as file:
        file.seek(source.start)
        while file.tell() < source.stop and (line := file.readline()):
            if line.strip():
                yield line if line.endswith(b"\n") else line + b"\n"


def _parse_line(line: bytes) -> dict[str, Any] | str:
    try:
        return parse_json_object(line.decode("utf-8-sig"))
    except ValueError as error:
        return str(error)


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
            yield SourceShard(_PARQUET, path, start, number + 1, options)
            start, rows, num_bytes, first_row = number + 1, 0, 0, first_row + rows
