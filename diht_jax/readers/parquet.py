"""Parquet files with images, such as those of img2dataset's output format "parquet".

Images are bytes, Hugging Face's struct of bytes and path, or paths in the file's folder (as in the
`metadata.parquet` of Hugging Face's imagefolder). Columns are those of `base.ColumnOptions`; the
others become metadata. If the file has Hugging Face's feature description, a number in a column
"label" gets its class name from there. In a folder with tars, parquet files of img2dataset only
hold metadata.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from typing import Any, NamedTuple

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
from diht_jax.records.tars import check_expansion
from diht_jax.storage.files import parse_json
from diht_jax.storage.stores import (
    BLOCK_BYTES,
    RangesFile,
    check_failure,
    input_size,
    is_remote,
    is_storage_failure,
    open_file,
)

SUFFIX = ".parquet"
LABEL_COLUMN = "label"
# Hugging Face's name for a table of the pictures in the same folder.
_IMAGE_TABLE = "metadata.parquet"

# Arrow's read size for a column of a local file; by default, it reads the whole column chunk.
_BUFFER_BYTES = 2**20


def open_parquet(path: str, *, is_footer_enough: bool = False) -> Any:
    """Opens a `pyarrow.parquet.ParquetFile` at a path or URL, with retried reads.

    For a file in a store, Arrow requests the columns that are read, and joins adjacent ones.
    `is_footer_enough` states that no row will be read.

    Raises:
        ValueError: the file is not valid parquet.
    """
    import pyarrow
    import pyarrow.parquet

    is_stored = is_remote(path)
    is_small = not is_stored or (not is_footer_enough and input_size(path) <= BLOCK_BYTES)
    # A small file in a store is read with one request.
    file = open_file(path) if is_small else RangesFile(path)
    buffer_size = 0 if is_stored else _BUFFER_BYTES
    with explain_errors(path, lambda: "cannot be read as parquet"):
        try:
            return pyarrow.parquet.ParquetFile(
                file,
                buffer_size=buffer_size,
                pre_buffer=is_stored,
                page_checksum_verification=True,
            )
        except (pyarrow.ArrowInvalid, OSError):
            check_failure(file)
            raise


@contextlib.contextmanager
def explain_errors(path: str, describe: Callable[[], str]) -> Generator[None]:
    """Converts Arrow's errors to a ValueError that names the file; storage errors pass through.

    `describe` returns what is wrong with the file if its contents are invalid.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, OSError, UnicodeDecodeError, MemoryError) as error:
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: {describe()} ({error})") from error


class BadRow(NamedTuple):
    """A row with a value that Python cannot represent, such as an invalid date or invalid text."""

    values: dict[str, Any]  # the valid values, by column
    columns: set[str]  # columns of the invalid values
    detail: str  # file, column and error, in words


def batch_rows(path: str, batch: Any) -> list[dict[str, Any] | BadRow]:
    """Returns the rows of a record batch of a file."""
    try:
        return batch.to_pylist()
    except Exception:  # Arrow raises nearly any type; convert value by value
        return [_row(path, batch, number) for number in range(batch.num_rows)]


def _row(path: str, batch: Any, number: int) -> dict[str, Any] | BadRow:
    values, bad, detail = {}, set(), ""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[number].as_py()
        except Exception as error:
            bad.add(name)
            # Arrow's message asks for a package that may be installed.
            reason = "no such time zone is known" if "zoneinfo" in str(error) else error
            detail = detail or f"{path}: column '{name}' ({column.type}): {reason}"
    return BadRow(values, bad, detail) if bad else values


def read_rows(
    path: str, file: Any, columns: list[str] | None = None
) -> Iterator[dict[str, Any] | BadRow]:
    """Yields the rows of a file from `open_parquet` one by one, with some columns or all.

    Batches of one row bound the memory: a few bytes can encode many rows of hundreds of megabytes
    each, which Arrow would unpack together.
    """
    for row_groups in _row_group_runs(file.metadata):
        for batch in file.iter_batches(1, row_groups, columns=columns, use_threads=False):
            yield from batch_rows(path, batch)


def _row_group_runs(metadata: Any) -> Iterator[list[int]]:
    """Yields runs of adjacent row groups up to `BLOCK_BYTES`, at least one, to read together."""
    run, num_bytes = [], 0
    for number in range(metadata.num_row_groups):
        # Does not use the columns' sizes, which crash pyarrow if the footer is damaged.
        size = max(0, metadata.row_group(number).total_byte_size)
        if run and num_bytes + size > BLOCK_BYTES:
            yield run
            run, num_bytes = [], 0
        run.append(number)
        num_bytes += size
    if run:
        yield run


def list_parquet_shards(path: str, options: ColumnOptions) -> list[SourceShard]:
    """Returns one shard for each file, with the options that were set.

    Images of a local `metadata.parquet` are compared with those of an earlier run.
    """
    stated = {k: v for k, v in dataclasses.asdict(options).items() if v is not None}
    root = options.image_root or path
    reads_linked = os.path.basename(path).lower() == _IMAGE_TABLE and not is_remote(root)
    return [SourceShard("parquet", path, options=stated, reads_linked=reads_linked)]


def read_parquet(source: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one file, in order.

    Raises:
        ValueError: the file is damaged, unpacks to far more than its size, or lacks a column of
            images or of captions.
    """
    file = open_parquet(source.path)
    options = _find_columns(source, file.schema_arrow.names, source.needs_caption)
    class_names = _read_class_names(file.schema_arrow.metadata)
    stem = clean_text(os.path.splitext(os.path.basename(source.path))[0])
    used = {options.image_column, options.caption_column, options.key_column}
    unneeded = set(source.unneeded) - used
    seen: set[str] = set()
    number = 0
    num_bytes, unpacked_bytes = input_size(source.path), 0
    with explain_errors(source.path, lambda: f"damaged at row {number}"):
        for row in read_rows(source.path, file):
            if isinstance(row, BadRow) and row.columns <= unneeded:
                row = row.values
            values = row.values if isinstance(row, BadRow) else row
            own_key = values.get(options.key_column)
            key = ("" if own_key is None else clean_text(str(own_key))) or f"{stem}-{number:08d}"
            number += 1
            image = _image_of(values.get(options.image_column))
            unpacked_bytes += len(image or b"")
            check_expansion(source.path, num_bytes, unpacked_bytes)
            if isinstance(row, BadRow):
                yield Skipped(key, "bad_row", row.detail)
                continue
            if key in seen:
                yield Skipped(key, "duplicate", "the key was there before")
                continue
            seen.add(key)
            pair = make_pair(
                key, image, row, options, needs_caption=source.needs_caption, clean=clean_row
            )
            if isinstance(pair, Pair) and "class_name" not in pair.metadata:
                label = pair.metadata.get(LABEL_COLUMN)
                if isinstance(label, int) and 0 <= label < len(class_names):
                    metadata = {**pair.metadata, "class_name": class_names[label]}
                    pair = dataclasses.replace(pair, metadata=metadata)
            yield pair


def list_parquet_images(source: SourceShard) -> Iterator[tuple[str, str]]:
    """Yields folder and path in it of every image that a file names."""
    try:
        file = open_parquet(source.path)
        options = _find_columns(source, file.schema_arrow.names, needs_caption=False)
        column = str(options.image_column)
        for row in read_rows(source.path, file, [column]):
            values = row.values if isinstance(row, BadRow) else row
            if isinstance(name := _image_of(values.get(column)), str):
                yield str(options.image_root), name
    except ValueError:
        return  # the reader of the file raises this error


def _image_of(value: Any) -> bytes | str | None:
    """Returns an image's bytes, or its path if Hugging Face's struct has no bytes."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return value if isinstance(value, bytes | str) else None


def _find_columns(
    source: SourceShard, names: Collection[str], needs_caption: bool
) -> ColumnOptions:
    """Returns the columns of a file from its options and column names; "" for no captions."""
    known = {field.name for field in dataclasses.fields(ColumnOptions)} & source.options.keys()
    options = ColumnOptions(**{name: source.options[name] for name in known})
    root = options.image_root or os.path.dirname(source.path) or "."
    options = dataclasses.replace(
        options,
        key_column=options.key_column or ("key" if "key" in names else None),
    )
    options, missing = find_columns(names, options)
    if options.caption_column is None and not needs_caption:
        options, missing = find_columns(names, dataclasses.replace(options, caption_column=""))
    if missing:
        raise ValueError(
            f"{describe_missing(source.path, names, missing)}; to filter a table of captions "
            "without images use --config prep/metadata"
        )
    root = root if is_remote(root) else os.path.realpath(root)
    return dataclasses.replace(options, image_root=root)


def _read_class_names(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """Returns the class names from Hugging Face's description of the label column, if any."""
    try:
        described = json.loads((metadata or {})[b"huggingface"])
        names = described["info"]["features"][LABEL_COLUMN]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else []


def clean_row(row: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """Returns a row's other columns as JSON can represent them: no NaN, dates as text, no bytes."""
    kept = {k: v for k, v in row.items() if k not in without and not isinstance(v, bytes | None)}
    # Bytes are also in lists and structs, such as Hugging Face's of a second image.
    return parse_json(json.dumps(kept, default=lambda v: None if isinstance(v, bytes) else str(v)))


FORMAT = Format(
    suffixes=(SUFFIX,),
    list_shards=list_parquet_shards,
    options=ColumnOptions,
    read=read_parquet,
    count=lambda source: open_parquet(source.path, is_footer_enough=True).metadata.num_rows,
    metadata_of=("webdataset", "tfrecord", "array_record"),
    list_linked_files=list_parquet_images,
)
