"""Filtering of tables of captions without their images; kept rows are written unchanged.

C and A need no images, so a list of URLs can be filtered before the download (DiHT, arXiv
2301.02280, "Complexity, Action, and Text-spotting"; the order is ours). Parquet keeps its columns
and types, jsonl the bytes of each line.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import ml_collections

from data_prep import sources
from data_prep.decisions.log import ShardLog
from data_prep.filtering import config as filter_config
from data_prep.filtering.shard import Chain
from data_prep.jobs import shards
from data_prep.jobs.engine import Report, WorkRecord
from data_prep.steps.base import Candidate, Step
from diht_jax.readers import parquet
from diht_jax.readers.base import ColumnOptions, Skipped, SourceShard, find_columns
from diht_jax.readers.registry import list_shards
from diht_jax.records.samples import clean_text, parse_columns, pick_captions
from diht_jax.records.schema import Pair
from diht_jax.storage import files
from diht_jax.storage.files import parse_json
from diht_jax.storage.stores import is_remote, open_file

PARQUET = "parquet"  # kind of the units of a parquet file
JSONL_SUFFIX = ".jsonl"

_BATCH_ROWS = 2048
_WRITTEN_ROWS = 2**16  # rows per row group of the output; fewer if they reach these bytes
_WRITTEN_BYTES = 2**28  # only reached by tables that contain images
# Minimum size of a unit of a remote parquet file, because every unit reads the footer again.
_STORE_UNIT_BYTES = 2**26

_Row = dict[str, Any] | str  # a str is the reason why the row could not be read
_Select = Callable[[Sequence[_Row]], list[bool]]  # rows -> one flag per row, True if it is kept


def filter_rows(
    task: shards.ShardTask,
    report: Report,
    *,
    config: ml_collections.ConfigDict,
    steps: Sequence[type[Step]],
) -> dict[str, Any]:
    """Filters the rows of one unit, and returns its statistics.

    Raises:
        ValueError: the input is damaged.
    """
    described = shards.begin_task(task)
    log, source, kept = ShardLog(config), task.source, set[int]()
    # The units of a table with options of its own state these options.
    caption, key = (
        source.options.get(name, config.source[name]) for name in ("caption_column", "key_column")
    )
    columns = parse_columns(config.caption_columns, "config.caption_columns")
    captions, keys = [caption, "captions", *columns], [key, "key", "uid"]
    numbers = itertools.count()

    def keep(candidate: Candidate, log: ShardLog) -> int:
        log.keep(candidate)
        return candidate.row

    with WorkRecord(task.output, task.search) as work, files.local_output(task.output) as path:
        chain = Chain(config, steps, source, log, keep, kept.add)

        def select(rows: Sequence[_Row]) -> list[bool]:
            own = list(itertools.islice(numbers, len(rows)))
            first = source.options.get("first_row", 0)
            stem = clean_text(pathlib.Path(source.path).stem)
            pairs = [
                _make_pair(row, captions, keys, f"{stem}-{first + number:08d}")
                for number, row in zip(own, rows, strict=True)
            ]
            kept.clear()
            chain.run(work.begin(pairs, chain.try_one))
            report(len(rows))
            return [number in kept for number in own]

        if source.kind == PARQUET:
            reads_all = any("metadata" in step.reads for step in steps)
            wanted = None if reads_all else {*captions, *keys, config.label_field}
            _filter_parquet(source, path, select, wanted)
        else:
            remaining = _read_lines(source)
            with open(path, "xb") as output:
                while lines := list(itertools.islice(remaining, _BATCH_ROWS)):
                    output.writelines(itertools.compress(lines, select([*map(_parse, lines)])))
        facts = {"versions": filter_config.package_versions(config)} | chain.close()
    return shards.finish_task(task, described, log.write(task.output) | facts, log.kept)


def _make_pair(
    row: _Row, captions: Sequence[str | None], keys: Sequence[str | None], default_key: str
) -> Pair | Skipped:
    """Makes the pair of a row, without an image; an unreadable row becomes `Skipped`."""
    if isinstance(row, str):
        return Skipped(default_key, "bad_row", row)
    values = (row.get(name) for name in keys if name is not None)
    key = next((clean_text(str(v)) for v in values if v not in (None, "")), "") or default_key
    found = (row.get(name) for name in captions)
    texts = pick_captions(
        [text for value in found for text in (value if isinstance(value, list) else [value])]
    )
    if not texts:
        return Skipped(key, "no_caption", "")
    return Pair(key, b"", texts[0], {**parquet.clean_row(row), "captions": texts})


def _filter_parquet(
    source: SourceShard, path: pathlib.Path, select: _Select, columns: Collection[str | None] | None
) -> None:
    """Writes the selected rows; reads `columns` to decide about them, all columns if None."""
    import pyarrow
    import pyarrow.parquet

    file = parquet.open_parquet(source.path)
    schema, metadata = file.schema_arrow, file.metadata
    wanted = [name for name in schema.names if columns is None or name in columns]
    compression = "snappy"
    if metadata.num_row_groups and metadata.num_columns:  # columns rarely differ in compression
        compression = metadata.row_group(0).column(0).compression.lower()
    with pyarrow.parquet.ParquetWriter(
        path,
        schema,
        compression="none" if compression == "uncompressed" else compression,
        write_page_checksum=True,
    ) as writer:
        waiting: list[Any] = []
        with parquet.explain_errors(source.path, lambda: "damaged"):
            for batch in file.iter_batches(_BATCH_ROWS, range(source.start, source.end)):
                rows = parquet.batch_rows(source.path, batch.select(wanted))
                kept = select([r.detail if isinstance(r, parquet.BadRow) else r for r in rows])
                waiting.append(batch.filter(pyarrow.array(kept, pyarrow.bool_())))
                num_bytes = sum(part.nbytes for part in waiting)
                if sum(map(len, waiting)) >= _WRITTEN_ROWS or num_bytes >= _WRITTEN_BYTES:
                    writer.write_table(pyarrow.Table.from_batches(waiting, schema))
                    waiting = []
        if waiting:
            writer.write_table(pyarrow.Table.from_batches(waiting, schema))


def _read_lines(source: SourceShard) -> Iterator[bytes]:
    """Yields the non-blank lines of a byte range, each with a line break."""
    with open_file(source.path) as file:
        file.seek(source.start)
        while file.tell() < source.end and (line := file.readline()):
            if line.strip():
                yield line if line.endswith(b"\n") else line + b"\n"


def _parse(line: bytes) -> _Row:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        return str(error)


def list_units(pairs: str | None, source: ml_collections.ConfigDict) -> list[SourceShard]:
    """Divides the tables of `config.input` into units of about `rows_per_shard` rows.

    A unit is a range of bytes of a jsonl file, or a range of row groups of a parquet file.

    Raises:
        ValueError: nothing was found, a file is of another kind, or the caption column is missing.
    """
    if not pairs:
        raise ValueError("config.input is not set: expected parquet or jsonl files with captions")
    options = source.to_dict() | {"image_column": ""}  # no images are read
    units = []
    for text in sources.typed_texts(pairs):
        for unit in list_shards(text, **options):
            if unit.kind == PARQUET:
                units += _list_row_groups(unit, source)
            elif unit.kind == "table" and unit.path.lower().endswith(JSONL_SUFFIX):
                # Earlier runs recorded the image column of the config in their outputs.
                own = {**unit.options, "image_column": source.image_column}
                units.append(dataclasses.replace(unit, options=own, reads_linked=False))
            else:
                raise ValueError(
                    f"{unit}: config.metadata_only filters tables of captions; expected .parquet "
                    "or .jsonl files"
                )
    return units


def name_outputs(units: Sequence[SourceShard]) -> list[str]:
    """Returns output names: those of the inputs, numbered where an input has several units."""
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


def _list_row_groups(
    table: SourceShard, source: ml_collections.ConfigDict
) -> Iterator[SourceShard]:
    path, stated = table.path, table.options
    try:
        file = parquet.open_parquet(path, is_footer_enough=True)
    except (FileNotFoundError, ValueError):  # only the task of this file will fail
        yield SourceShard(PARQUET, path)
        return
    names = file.schema_arrow.names
    own = ColumnOptions("", stated.get("caption_column"), stated.get("key_column"))
    own, missing = find_columns(names, own)
    if missing:
        raise ValueError(
            f"{path}: no {' and no '.join(missing)}; found {', '.join(names)}; set "
            "config.source.caption_column or config.source.key_column"
        )
    start, rows, num_bytes, first_row = 0, 0, 0, 0
    least_bytes = _STORE_UNIT_BYTES if is_remote(path) else 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        rows += group.num_rows
        if least_bytes:  # pyarrow crashes on the column sizes of a damaged footer
            columns = map(group.column, range(group.num_columns))
            num_bytes += sum(column.total_compressed_size for column in columns)
        is_last = number + 1 == file.metadata.num_row_groups
        if (rows >= source.rows_per_shard and num_bytes >= least_bytes) or is_last:
            options = {"first_row": first_row, "caption_column": own.caption_column}
            if own.key_column != source.key_column:
                options["key_column"] = own.key_column
            yield SourceShard(PARQUET, path, start, number + 1, options)
            start, rows, num_bytes, first_row = number + 1, 0, 0, first_row + rows
