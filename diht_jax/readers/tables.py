"""Tables of captions of the images of a folder: jsonl, csv and tsv.

A table is cut into parts of `rows_per_shard` rows, so that many workers can share a large one; for
that it is read once more. One in an object store is a single part, and read once.
"""

from __future__ import annotations

import codecs
import collections
import csv
import dataclasses
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any, BinaryIO

from absl import logging

from diht_jax.readers.base import Format, Skipped, SourceShard, read_image
from diht_jax.records.samples import clean_text, merge_captions, pick_captions
from diht_jax.records.schema import Pair, parse_json_object
from diht_jax.storage.stores import input_size, is_remote, open_file, read_start

TABLE_SUFFIXES = (".jsonl", ".csv", ".tsv")

_MAX_FIELD_CHARS = 2**24
_MAX_LINE_BYTES = 2**28
_HEAD_BYTES = 2**18  # of a table in a store, in which its columns are looked for
_LARGE_TABLE_BYTES = 2**30
_IMAGES_AHEAD = 16  # requests at a time, where each image is one
# Texts in UTF-16 and UTF-32 begin so, with zeros among the bytes that follow.
_OTHER_ENCODINGS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


@dataclasses.dataclass(frozen=True)
class TableOptions:
    """The form of a table.

    Attributes:
        image_column: holds the image's path, relative to `image_root`.
        caption_column: holds the caption; in jsonl it may be a list of captions.
        key_column: holds the key; keys are made of table name and row number where it is None.
        image_root: folder of the images, or its URL; the table's own folder where it is None.
            Paths that lead out of it are refused.
        rows_per_shard: size of the parts of a local table.
    """

    image_column: str = "image"
    caption_column: str = "caption"
    key_column: str | None = None
    image_root: str | None = None
    rows_per_shard: int = 10_000


def list_table_shards(path: str, options: TableOptions) -> list[SourceShard]:
    """Cuts a local table into parts; of one in a store only the beginning is read.

    Images in a store are not compared with those of an earlier run: that would be a request each.

    Raises:
        ValueError: the table is empty, lacks a column, is no UTF-8 text, or `rows_per_shard` is not
            positive.
        StorageError: it cannot be read, now and after some attempts.
    """
    if options.rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={options.rows_per_shard}; expected at least 1")
    root = options.image_root or os.path.dirname(path) or "."
    if not is_remote(root) and not os.path.isdir(root):
        raise ValueError(f"{path}: there is no image folder '{root}'; set image_root")
    is_stored = is_remote(path)
    parts: list[tuple[int, int]] = []  # first byte and row
    count, header, position = 0, None, 0
    with io.BytesIO(read_start(path, _HEAD_BYTES)) if is_stored else open_file(path) as file:
        _check_encoding(path, file)
        if path.endswith(".jsonl"):
            _check_jsonl_columns(path, file, options)
        else:
            header, position = _read_csv_header(path, file, options)
        file.seek(position)
        rows = _whole(path, position) if is_stored else _row_extents(path, file)
        for start, stop in rows:
            if count % options.rows_per_shard == 0:
                parts.append((start, count))
            count, position = count + 1, stop
    if not count:
        raise ValueError(f"{path}: the table has no rows")
    stops = [start for start, _ in parts[1:]] + [position]
    shared = dataclasses.asdict(options) | {"image_root": root, "header": header}
    reads_linked = not (is_stored or is_remote(root))
    shards = []
    for (start, row), stop in zip(parts, stops, strict=True):
        num_rows = None if is_stored else min(options.rows_per_shard, count - row)
        own = shared | {"first_row": row, "num_rows": num_rows}
        shards.append(SourceShard("table", path, start, stop, own, reads_linked))
    return shards


def _whole(path: str, position: int) -> Iterator[tuple[int, int]]:
    """The rows of a table in a store as a single one, if there are any."""
    size = input_size(path)
    if size > _LARGE_TABLE_BYTES:
        logging.warning(
            "%s: %d MB in a store are a single unit of work; several smaller tables would let "
            "several workers read them",
            path,
            size // 10**6,
        )
    if position < size:
        yield position, size


def read_table(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one part of a table; images are read from the folder.

    Raises:
        ValueError: csv quoting that cannot be resolved.
        StorageError: the table, or an image, cannot be read, now and after some attempts.
    """
    first_row, header = shard.options["first_row"], shard.options["header"]
    options = TableOptions(
        **{f.name: shard.options[f.name] for f in dataclasses.fields(TableOptions)}
    )
    is_stored = is_remote(options.image_root)
    root = options.image_root if is_stored else os.path.realpath(options.image_root)
    stem = clean_text(pathlib.Path(shard.path).stem)

    def make(numbered: tuple[int, dict[str, Any] | str]) -> Pair | Skipped:
        number, row = numbered
        default_key = f"{stem}-{number:08d}"
        if isinstance(row, str):
            return Skipped(default_key, "bad_row", row)
        return _make_pair(row, options, root, default_key)

    rows = enumerate(_read_rows(shard, header), start=first_row)
    yield from map_ahead(make, rows) if is_stored else map(make, rows)


def map_ahead(make: Callable[[Any], Any], rows: Iterable[Any]) -> Iterator[Any]:
    """The results in order, of which some are made at the same time."""
    waiting: collections.deque[futures.Future[Any]] = collections.deque()
    with futures.ThreadPoolExecutor(_IMAGES_AHEAD) as pool:
        try:
            for row in rows:
                waiting.append(pool.submit(make, row))
                if len(waiting) == _IMAGES_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


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
    stated = row[options.caption_column]
    return Pair(key, image, captions[0], merge_captions(metadata, captions, stated))


def list_table_images(shard: SourceShard) -> Iterator[tuple[str, str]]:
    """Yields folder and path in it of every image that one part of a table names."""
    options = shard.options
    if "header" not in options:
        return  # not a part that `list_table_shards` has made
    for row in _read_rows(shard, options["header"]):
        name = None if isinstance(row, str) else row.get(options["image_column"])
        if isinstance(name, str) and name.strip():
            yield options["image_root"], name.strip()


def _read_rows(shard: SourceShard, header: list[str] | None) -> Iterator[dict[str, Any] | str]:
    """Yields rows, and a text about each one that is wrong."""
    with open_file(shard.path) as file:
        file.seek(shard.start)
        if header is None:
            for line in _read_lines(shard.path, file, shard.stop):
                if line.strip():
                    try:
                        yield parse_json_object(line.decode("utf-8-sig"))
                    except ValueError as error:
                        yield str(error)
            return
        for values in _read_csv(shard.path, file, shard.stop):
            if not values:
                continue
            if len(values) == len(header):
                yield dict(zip(header, values, strict=True))
            else:
                yield f"{len(values)} fields; the header has {len(header)}"


def _row_extents(path: str, file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Yields the first and last (exclusive) byte of every row that is not blank."""
    start = file.tell()
    for row in (_read_lines if path.endswith(".jsonl") else _read_csv)(path, file):
        end = file.tell()  # of the lines of this row, which were read one by one
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


def _check_jsonl_columns(path: str, file: BinaryIO, options: TableOptions) -> None:
    """Looks for rows with the columns, as a csv has them in its header; goes no further."""
    needed = [options.image_column, options.caption_column, options.key_column]
    missing = {name for name in needed if name}
    first: dict[str, Any] | None = None
    for line in _read_lines(path, file):
        try:
            row = parse_json_object(line.decode("utf-8-sig"))
        except ValueError:
            continue  # it is counted when the rows are read
        first = row if first is None else first
        missing -= row.keys()
        if not missing:
            return
    if first is not None:
        raise ValueError(
            f"{path}: no row has {', '.join(map(repr, sorted(missing)))}; the first one has "
            f"{', '.join(map(repr, list(first)[:20])) or 'nothing':.500}; set image_column, "
            "caption_column or key_column"
        )


def _read_csv_header(path: str, file: BinaryIO, options: TableOptions) -> tuple[list[str], int]:
    header = next(_read_csv(path, file), [])
    header = [name.removeprefix("\ufeff").strip() for name in header]
    needed = [options.image_column, options.caption_column, options.key_column]
    missing = [name for name in needed if name and name not in header]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(map(repr, missing))}; the header has "
            f"{', '.join(map(repr, header)) or 'nothing'}; set image_column, caption_column or "
            "key_column"
        )
    return header, file.tell()


def _read_csv(path: str, file: BinaryIO, stop: int | None = None) -> Iterator[list[str]]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    lines = (line.decode("utf-8", "replace") for line in _read_lines(path, file, stop))
    delimiter = "\t" if path.endswith(".tsv") else ","
    # Strict: a quote that is never closed is an error, instead of swallowing all rows behind it.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{path}: line {reader.line_num} of this part: {error}") from error


def _read_lines(path: str, file: BinaryIO, stop: int | None = None) -> Iterator[bytes]:
    """Yields the lines from the position of a file on, up to a byte."""
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
    list_shards=list_table_shards,
    options=TableOptions,
    read=read_table,
    count=lambda shard: shard.options.get("num_rows"),
    list_linked_files=list_table_images,
)
