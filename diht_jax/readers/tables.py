"""Tables of captions for the images of a folder: jsonl, csv, tsv, and lists in json.

A table is cut into parts of `rows_per_shard` rows for parallel workers, which reads it one more
time. A json file, or a table in an object store, is a single part. Fields of a csv are separated by
commas, tabs or semicolons, as detected from its header.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

from absl import logging

from diht_jax.readers.base import (
    ColumnOptions,
    Format,
    Skipped,
    SourceShard,
    describe_missing,
    find_columns,
    make_pair,
)
from diht_jax.records.samples import Pair, clean_text
from diht_jax.storage.files import map_many, parse_json, read_bytes
from diht_jax.storage.stores import input_size, is_remote, open_file, read_start

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv", ".json")

_CSV_SUFFIXES = (".csv", ".tsv")
_DELIMITERS = (",", "\t", ";")
_CONVERT_LATIN = "`iconv -f WINDOWS-1252 -t UTF-8` converts Windows' Latin letters"
_MAX_FIELD_CHARS = 2**24
_MAX_LINE_BYTES = 2**28
_HEAD_BYTES = 2**18  # start of a table in a store, searched for its columns
_LARGE_TABLE_BYTES = 2**30
# First bytes of UTF-16 and UTF-32 texts, with zeros among the bytes that follow.
_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclasses.dataclass(frozen=True)
class TableOptions(ColumnOptions):
    """Options of a table."""

    rows_per_shard: int = 10_000  # size of the parts of a local table


def list_table_shards(path: str, options: TableOptions) -> list[SourceShard]:
    """Cuts a local table into parts; only reads the beginning of a table in a store.

    Images in a store are not compared with those of an earlier run, which would take a request per
    image. A table without rows has no parts, with a warning, so other tables are still read.

    Raises:
        ValueError: the table lacks a column, is not UTF-8, or `rows_per_shard` is not positive.
        StorageError: the table cannot be read, even after retries.
    """
    if options.rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={options.rows_per_shard}; expected at least 1")
    if not (is_remote(path) or os.path.isfile(path)):
        # Reading this shard raises the error; other tables are still read.
        return [SourceShard("table", path, reads_linked=False)]
    root = options.image_root or os.path.dirname(path) or "."
    if not is_remote(root) and not os.path.isdir(root):
        raise ValueError(f"{path}: there is no image folder '{root}'; set image_root")
    is_stored = is_remote(path)
    parts: list[tuple[int, int]] = []  # first byte and row
    count, position = 0, 0
    header = delimiter = None
    with io.BytesIO(read_start(path, _HEAD_BYTES)) if is_stored else open_file(path) as file:
        _check_encoding(path, file)
        if _has_suffix(path, *_CSV_SUFFIXES):
            options, header, delimiter = _read_csv_header(path, file, options)
            position = file.tell()
        else:
            parsed = (_parse_line(path, line) for line in _read_lines(path, file))
            rows = _read_json(path) if _has_suffix(path, ".json") else parsed
            options = _find_json_columns(path, rows, options)
        file.seek(position)
        is_one = is_stored or _has_suffix(path, ".json")
        extents = _whole(path, position) if is_one else _row_extents(path, file, delimiter)
        for start, stop in extents:
            if count % options.rows_per_shard == 0:
                parts.append((start, count))
            count, position = count + 1, stop
    if not count:
        logging.warning("%s: the table has no rows", path)
        return []
    stops = [start for start, _ in parts[1:]] + [position]
    shared = dataclasses.asdict(options) | {"image_root": root}
    shared |= {"header": header, "delimiter": delimiter}
    reads_linked = not (is_stored or is_remote(root))
    shards = []
    for (start, row), stop in zip(parts, stops, strict=True):
        num_rows = None if is_one else min(options.rows_per_shard, count - row)
        own = shared | {"first_row": row, "num_rows": num_rows}
        shards.append(SourceShard("table", path, start, stop, own, reads_linked))
    return shards


def _has_suffix(path: str, *suffixes: str) -> bool:
    return path.lower().endswith(suffixes)


def _whole(path: str, position: int) -> Iterator[tuple[int, int]]:
    """Yields the rows of an undivided table as a single extent, if there are any."""
    size = input_size(path)
    if size > _LARGE_TABLE_BYTES:
        message = "%s: %d MB are one unit of work; several workers could read smaller tables"
        logging.warning(message, path, size // 10**6)
    if position < size:
        yield position, size


def read_table(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one part of a table; images are read from the folder.

    Raises:
        ValueError: the csv has invalid quoting.
    """
    if not shard.options:
        read_bytes(shard.path)  # raises, since the file was missing at listing
        raise ValueError(f"{shard.path}: it appeared after the command began; run it again")
    stated = {f.name: shard.options[f.name] for f in dataclasses.fields(TableOptions)}
    root = stated["image_root"]  # set when the table was listed
    is_stored = is_remote(root)
    options = TableOptions(**stated | {"image_root": root if is_stored else os.path.realpath(root)})
    stem = clean_text(pathlib.Path(shard.path).stem)

    def make(numbered: tuple[int, dict[str, Any] | str]) -> Pair | Skipped:
        number, row = numbered
        default_key = f"{stem}-{number:08d}"
        if isinstance(row, str):
            return Skipped(default_key, "bad_row", row)
        own_key = row.get(options.key_column)
        key = ("" if own_key is None else clean_text(str(own_key))) or default_key
        name = row.get(options.image_column)
        return make_pair(key, name.strip() if isinstance(name, str) else None, row, options)

    rows = enumerate(_read_rows(shard), start=shard.options["first_row"])
    yield from map_many(make, rows, root)


def list_table_images(shard: SourceShard) -> Iterator[tuple[str, str]]:
    """Yields folder and path in it of every image that one part of a table names."""
    options = shard.options
    if "header" not in options:
        return  # not a part made by `list_table_shards`
    for row in _read_rows(shard):
        name = None if isinstance(row, str) else row.get(options["image_column"])
        if isinstance(name, str) and name.strip():
            yield options["image_root"], name.strip()


def _read_rows(shard: SourceShard) -> Iterator[dict[str, Any] | str]:
    """Yields rows, and an error message in place of each invalid row."""
    if _has_suffix(shard.path, ".json"):
        yield from _read_json(shard.path)
        return
    header = shard.options["header"]
    with open_file(shard.path) as file:
        file.seek(shard.start)
        if header is None:
            lines = _read_lines(shard.path, file, shard.stop)
            yield from (_parse_line(shard.path, line) for line in lines if line.strip())
            return
        for values in _read_csv(shard.path, file, shard.options["delimiter"], shard.stop):
            if not values:
                continue
            if len(values) != len(header):
                yield f"{shard.path}: {len(values)} fields; the header has {len(header)}"
                continue
            bad = next((n for n, value in zip(header, values, strict=True) if _is_bad(value)), None)
            if bad is None:
                yield dict(zip(header, values, strict=True))
            else:
                yield f"{shard.path}: column '{bad}' is not UTF-8; {_CONVERT_LATIN}"


def _is_bad(text: str) -> bool:
    """Returns whether a text had bytes that are not UTF-8, as marked by `_read_csv`."""
    return not text.isascii() and any("\udc80" <= letter <= "\udcff" for letter in text)


def _parse_line(path: str, line: bytes) -> dict[str, Any] | str:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return f"{path}: a line is not UTF-8 ({error}); {_CONVERT_LATIN}"
    except ValueError as error:
        return f"{path}: {error}"


def _read_json(path: str) -> Iterator[dict[str, Any] | str]:
    """Yields the rows of a json file, and an error message in place of each invalid row."""
    try:
        rows = parse_json(read_bytes(path).decode("utf-8-sig"), object)
    except ValueError as error:
        raise ValueError(f"{path}: no JSON ({error})") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{path}: a JSON {type(rows).__name__}; expected a list of objects, such as "
            '[{"image": "a.jpg", "caption": "a dog"}]'
        )
    for row in rows:
        yield row if isinstance(row, dict) else f"a JSON {type(row).__name__}; expected an object"


def _row_extents(path: str, file: BinaryIO, delimiter: str | None) -> Iterator[tuple[int, int]]:
    """Yields the first and last (exclusive) byte of every row that is not blank."""
    start = file.tell()
    for row in _read_csv(path, file, delimiter) if delimiter else _read_lines(path, file):
        end = file.tell()  # end of the row, since lines are read one by one
        if row.strip() if isinstance(row, bytes) else row:
            yield start, end
        start = end


def _check_encoding(path: str, file: BinaryIO) -> None:
    head = file.read(64)
    file.seek(0)
    if head.startswith(_OTHER_ENCODINGS) and b"\0" in head:
        raise ValueError(
            f"{path}: the text is in UTF-16 or UTF-32; expected UTF-8: save it so, or convert it "
            "with `iconv -f UTF-16 -t UTF-8`"
        )


def _find_json_columns(
    path: str, rows: Iterable[dict[str, Any] | str], options: TableOptions
) -> TableOptions:
    """Reads rows until all columns were seen, since json has no header."""
    names: dict[str, None] = {}
    for row in rows:
        if isinstance(row, str):
            continue  # invalid rows are counted when the rows are read
        names |= dict.fromkeys(row)
        found, missing = find_columns(names, options)
        if not missing:
            return found
    if names:
        raise ValueError(describe_missing(path, names, missing))
    return options


def _read_csv_header(
    path: str, file: BinaryIO, options: TableOptions
) -> tuple[TableOptions, list[str], str]:
    """Returns the options with the columns' names, the header, and the delimiter."""
    best: list[str] = []
    # Skips a byte order mark, since quotes after it would become part of the first name.
    start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    for delimiter in ("\t",) if _has_suffix(path, ".tsv") else _DELIMITERS:
        file.seek(start)
        header = next(filter(None, _read_csv(path, file, delimiter, strict=False)), [])
        if any(map(_is_bad, header)):
            raise ValueError(f"{path}: the header is not UTF-8; {_CONVERT_LATIN}")
        header = [name.strip() for name in header]
        found, missing = find_columns(header, options)
        if not missing:
            return found, header, delimiter
        best = max(best, header, key=len)
    if not best:  # there are no rows either
        return options, [], _DELIMITERS[0]
    raise ValueError(describe_missing(path, best, find_columns(best, options)[1]))


def _read_csv(
    path: str, file: BinaryIO, delimiter: str, stop: int | None = None, strict: bool = True
) -> Iterator[list[str]]:
    """Yields the fields of each row; a byte that is not UTF-8 becomes a lone surrogate."""
    csv.field_size_limit(_MAX_FIELD_CHARS)
    lines = (line.decode("utf-8", "surrogateescape") for line in _read_lines(path, file, stop))
    # Strict: an unclosed quote is an error instead of swallowing all rows after it.
    reader = csv.reader(lines, delimiter=delimiter, strict=strict)
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} of this part: {error}") from error


def _read_lines(path: str, file: BinaryIO, stop: int | None = None) -> Iterator[bytes]:
    """Yields the lines from a file's current position up to a byte."""
    while stop is None or file.tell() < stop:
        line = file.readline(_MAX_LINE_BYTES + 1)
        if len(line) > _MAX_LINE_BYTES:
            raise ValueError(
                f"{path}: before byte {file.tell()} is a line of over {_MAX_LINE_BYTES} bytes; "
                "expected a row of text"
            )
        if not line:
            return
        yield line


FORMAT = Format(
    suffixes=TABLE_SUFFIXES,
    named_only=(".json", ".samples.tsv"),  # the second is a file of the filter next to a shard
    list_shards=list_table_shards,
    options=TableOptions,
    read=read_table,
    count=lambda shard: shard.options.get("num_rows"),
    list_linked_files=list_table_images,
)
