"""Tables of captions beside a folder of images: jsonl, csv and tsv.

A table is cut into parts of so many rows, so that many workers can share a large one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from diht_jax.data.readers.base import (
    Format,
    Skipped,
    SourceShard,
    clean_text,
    merge_captions,
    parse_json_object,
    pick_captions,
    read_image,
)
from diht_jax.data.records.schema import Pair

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")

_MAX_FIELD_CHARS = 2**24


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """How to read a table.

    Attributes:
        image_column: holds the image's path, relative to `image_root`.
        caption_column: holds the caption; in jsonl it may be a list of captions.
        key_column: holds the key; keys are made of table name and row number where it is None.
        image_root: folder of the images; the table's own folder where it is None. Paths that lead
            out of it are refused.
        rows_per_shard: size of the parts.
    """

    image_column: str = "image"
    caption_column: str = "caption"
    key_column: str | None = None
    image_root: str | None = None
    rows_per_shard: int = 10_000


def list_table_shards(path: str, options: TableOptions) -> list[SourceShard]:
    """Cuts a table into parts.

    Args:
        path: of a jsonl, csv or tsv file.
        options: of the table.

    Raises:
        ValueError: the table is empty, a csv lacks a column, or `rows_per_shard` is not positive.
    """
    if options.rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={options.rows_per_shard}; expected at least 1")
    root = options.image_root or os.path.dirname(path) or "."
    if not os.path.isdir(root):
        raise ValueError(f"{path}: there is no image folder '{root}'; set image_root")
    shared = dataclasses.asdict(options) | {"image_root": root}
    header: list[str] | None = None
    boundaries, row_count, position = [], 0, 0
    with open(path, "rb") as file:
        if not path.endswith(".jsonl"):
            header, position = _read_csv_header(path, file, options)
        for row_start, row_end in _row_extents(path, file, position):
            if row_count % options.rows_per_shard == 0:
                boundaries.append((row_start, row_count))
            row_count, position = row_count + 1, row_end
    if not row_count:
        raise ValueError(f"{path}: the table has no rows")
    stops = [start for start, _ in boundaries[1:]] + [position]
    return [
        SourceShard("table", path, start, stop, shared | {"first_row": first_row, "header": header})
        for (start, first_row), stop in zip(boundaries, stops, strict=True)
    ]


def read_table(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one part of a table; images are read from the folder.

    Args:
        shard: as `list_table_shards` gives.

    Raises:
        ValueError: csv quoting that cannot be resolved.
    """
    first_row, header = shard.options["first_row"], shard.options["header"]
    options = TableOptions(
        **{f.name: shard.options[f.name] for f in dataclasses.fields(TableOptions)}
    )
    root = os.path.realpath(options.image_root)
    stem = clean_text(pathlib.Path(shard.path).stem)
    for number, row in enumerate(_read_rows(shard, header), start=first_row):
        default_key = f"{stem}-{number:08d}"
        if isinstance(row, str):
            yield Skipped(default_key, "bad_row", row)
        else:
            yield _make_pair(row, options, root, default_key)


def _make_pair(
    row: dict[str, Any], options: TableOptions, root: str, default_key: str
) -> Pair | Skipped:
    own_key = row.get(options.key_column)
    key = ("" if own_key is None else clean_text(str(own_key))) or default_key
    relative = row.get(options.image_column)
    if not isinstance(relative, str) or not relative.strip():
        return Skipped(key, "no_image", f"nothing in column '{options.image_column}'")
    captions = pick_captions(row.get(options.caption_column))
    if not captions:
        return Skipped(key, "no_caption", f"nothing in column '{options.caption_column}'")
    image = read_image(root, relative.strip(), key)
    if isinstance(image, Skipped):
        return image
    used = (options.image_column, options.caption_column, options.key_column)
    metadata = {name: value for name, value in row.items() if name not in used}
    return Pair(key, image, captions[0], merge_captions(metadata, captions))


def _read_rows(shard: SourceShard, header: list[str] | None) -> Iterator[dict[str, Any] | str]:
    """Yields rows, or what is wrong with them."""
    with open(shard.path, "rb") as file:
        file.seek(shard.start)
        data = file.read(shard.stop - shard.start)
    if header is None:
        for line in data.split(b"\n"):
            if line.strip():
                try:
                    yield parse_json_object(line.decode("utf-8-sig"))
                except ValueError as error:
                    yield str(error)
        return
    for values in _csv_reader(shard.path, _CountedLines(io.BytesIO(data), 0)):
        if not values:
            continue
        if len(values) == len(header):
            yield dict(zip(header, values, strict=True))
        else:
            yield f"{len(values)} fields; the header has {len(header)}"


def _row_extents(path: str, file: BinaryIO, position: int) -> Iterator[tuple[int, int]]:
    """Yields the first and last (exclusive) byte of every row that is not blank."""
    if path.endswith(".jsonl"):
        for line in file:
            start, position = position, position + len(line)
            if line.strip():
                yield start, position
        return
    counter = _CountedLines(file, position)
    for values in _csv_reader(path, counter):
        start, position = position, counter.position
        if values:
            yield start, position


def _read_csv_header(path: str, file: BinaryIO, options: TableOptions) -> tuple[list[str], int]:
    counter = _CountedLines(file, 0)
    header = next(_csv_reader(path, counter), [])
    header = [name.removeprefix("\ufeff").strip() for name in header]
    needed = [options.image_column, options.caption_column, options.key_column]
    missing = [name for name in needed if name and name not in header]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, missing))}; the header has "
            f"{', '.join(map(repr, header)) or 'nothing'}; set image_column, caption_column or "
            "key_column"
        )
    return header, counter.position


def _csv_reader(path: str, lines: Iterator[str]) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    delimiter = "\t" if path.endswith(".tsv") else ","
    # Strict: a quote that is never closed is an error, instead of swallowing all rows behind it.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} of this part: {error}") from error


class _CountedLines(Iterator[str]):
    """Decoded lines of a file, and the byte after the last one that was taken."""

    def __init__(self, file: BinaryIO, position: int):
        self._file = file
        self.position = position

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            raise StopIteration
        self.position += len(line)
        return line.decode("utf-8", "replace")


def _count_lines(shard: SourceShard) -> int:
    """Lines of a part; a row of a csv with line breaks in it counts too often."""
    with open(shard.path, "rb") as file:
        file.seek(shard.start)
        data = file.read(shard.stop - shard.start)
    return data.count(b"\n") + (bool(data) and not data.endswith(b"\n"))


FORMAT = Format(
    suffixes=TABLE_SUFFIXES,
    list_shards=list_table_shards,
    options=TableOptions,
    read=read_table,
    count=_count_lines,
)
