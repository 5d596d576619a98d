"""Parquet files with images, such as those of img2dataset's output format "parquet".

Images stand in a column named by their extension, or in one of the name "image", as bytes or as
Hugging Face's struct of bytes and path; captions in one of `CAPTION_COLUMNS`; the other columns
become metadata. A number in a column "label" gets its name from Hugging Face's description in the
file, where there is one. In a folder with tars,
img2dataset's parquet files hold metadata only.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diht_jax.readers.base import IMAGE_EXTENSIONS, MAX_IMAGE_BYTES, Format, Skipped, SourceShard
from diht_jax.records.formats.tar_members import check_expansion
from diht_jax.records.samples import clean_text, merge_captions, pick_captions
from diht_jax.records.schema import Pair, parse_json_object
from diht_jax.storage.retries import is_storage_failure
from diht_jax.storage.stores import (
    BLOCK_BYTES,
    RangesFile,
    check_failure,
    input_size,
    is_remote,
    open_file,
    open_ranges,
)

SUFFIX = ".parquet"
IMAGE_COLUMNS = (*IMAGE_EXTENSIONS, "image")
CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")
LABEL_COLUMN = "label"

# Bytes of a column of a local file that Arrow reads at once, instead of all of it in a row group.
_BUFFER_BYTES = 2**20


def open_parquet(path: str, *, is_footer_enough: bool = False) -> Any:
    """The `pyarrow.parquet.ParquetFile` at a path; its reads are tried again.

    Of a file in a store, Arrow requests the columns that are read, neighbours together.

    Args:
        path: of the file, or its URL.
        is_footer_enough: whether no row will be read.

    Raises:
        ValueError: it cannot be read as one.
        StorageError: it cannot be read, now and after some attempts.
    """
    import pyarrow
    import pyarrow.parquet

    is_stored = is_remote(path)
    is_small = not is_stored or (not is_footer_enough and input_size(path) <= BLOCK_BYTES)
    # Of a small file in a store the whole is one request.
    file = open_file(path) if is_small else RangesFile(open_ranges(path))
    buffer_size = 0 if is_stored else _BUFFER_BYTES
    try:
        return pyarrow.parquet.ParquetFile(file, buffer_size=buffer_size, pre_buffer=is_stored)
    except (pyarrow.ArrowInvalid, OSError) as error:
        check_failure(file)
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error


@contextlib.contextmanager
def explain_errors(path: str, describe: Callable[[], str]) -> Iterator[None]:
    """Makes Arrow's errors a ValueError that names the file; those of a disk stay what they are.

    Args:
        path: of the file that is being read.
        describe: what is wrong with it, if its contents are.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowInvalid, OSError, MemoryError) as error:
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: {describe()} ({error})") from error


def read_rows(file: Any, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file of `open_parquet`, one at a time.

    A few bytes can stand for many rows of hundreds of megabytes each, which Arrow would unpack
    together, however few rows a batch had.

    Args:
        file: of `open_parquet`.
        columns: names of those that are read; all where None.
    """
    for row_groups in _row_group_runs(file.metadata):
        for batch in file.iter_batches(1, row_groups, columns=columns, use_threads=False):
            yield from batch.to_pylist()


def _row_group_runs(metadata: Any) -> Iterator[list[int]]:
    """Neighbouring row groups of up to `BLOCK_BYTES`, which Arrow holds together; one at least."""
    run, num_bytes = [], 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = sum(group.column(n).total_compressed_size for n in range(group.num_columns))
        if run and num_bytes + size > BLOCK_BYTES:
            yield run
            run, num_bytes = [], 0
        run.append(number)
        num_bytes += size
    if run:
        yield run


def read_parquet(source: SourceShard, *, needs_caption: bool = True) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one file, in its order.

    Args:
        source: a whole parquet file.
        needs_caption: whether rows without captions are skipped; else theirs is empty.

    Raises:
        ValueError: the file is damaged, unpacks to far more than it takes, or has no column of
            images or of captions.
        StorageError: it cannot be read, now and after some attempts.
    """
    file = open_parquet(source.path)
    names = file.schema_arrow.names
    image_column = _find_column(source.path, names, IMAGE_COLUMNS, "images")
    caption_column = None
    if needs_caption or not set(CAPTION_COLUMNS).isdisjoint(names):
        caption_column = _find_column(source.path, names, CAPTION_COLUMNS, "captions")
    class_names = _read_class_names(file.schema_arrow.metadata)
    stem = os.path.basename(source.path).removesuffix(SUFFIX)
    seen: set[str] = set()
    number = 0
    num_bytes, unpacked_bytes = input_size(source.path), 0
    with explain_errors(source.path, lambda: f"damaged at row {number}"):
        for row in read_rows(file):
            key = clean_text(str(row.get("key") or "")) or f"{stem}-{number:08d}"
            number += 1
            if isinstance(row[image_column], dict):  # Hugging Face's struct
                row[image_column] = row[image_column].get("bytes")
            unpacked_bytes += len(row[image_column] or b"")
            check_expansion(source.path, num_bytes, unpacked_bytes)
            if key in seen:
                yield Skipped(key, "duplicate", "the key was there before")
                continue
            seen.add(key)
            pair = _make_pair(key, row, image_column, caption_column, needs_caption)
            if isinstance(pair, Pair) and "class_name" not in pair.metadata:
                pair.metadata.update(_class_name(pair.metadata.get(LABEL_COLUMN), class_names))
            yield pair


def _class_name(label: Any, names: list[str]) -> dict[str, str]:
    if isinstance(label, int) and 0 <= label < len(names):
        return {"class_name": names[label]}
    return {}


def _read_class_names(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """The names in Hugging Face's description of the column of labels, if any."""
    try:
        described = json.loads((metadata or {})[b"huggingface"])
        names = described["info"]["features"][LABEL_COLUMN]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if is_list else []


def _make_pair(
    key: str,
    row: dict[str, Any],
    image_column: str,
    caption_column: str | None,
    needs_caption: bool,
) -> Pair | Skipped:
    image = row[image_column]
    if not isinstance(image, bytes) or not image:
        status = row.get("error_message") or row.get("status") or "nothing in the column"
        return Skipped(key, "no_image", str(status))
    if len(image) > MAX_IMAGE_BYTES:
        return Skipped(key, "too_large", f"an image of {len(image)} bytes")
    captions = pick_captions(row[caption_column]) if caption_column else []
    if needs_caption and not captions:
        return Skipped(key, "no_caption", f"nothing in column '{caption_column}'")
    metadata = clean_row(row, ("key", image_column, caption_column or ""))
    caption = captions[0] if captions else ""
    stated = row[caption_column] if caption_column else None
    return Pair(key, image, caption, merge_captions(metadata, captions, stated))


def _find_column(path: str, names: list[str], wanted: tuple[str, ...], what: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(
        f"{path}: no column of {what}; expected one of {', '.join(wanted)}, found "
        f"{', '.join(names)}; to filter a table of captions without images use "
        "configs/prep/metadata.py"
    )


def clean_row(row: Mapping[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """A row's columns but some, as JSON can hold them: no NaN, dates as text, no bytes."""
    kept = {k: v for k, v in row.items() if k not in without and v is not None}
    kept = {k: v for k, v in kept.items() if not isinstance(v, bytes)}
    return parse_json_object(json.dumps(kept, default=str))


FORMAT = Format(
    suffixes=(SUFFIX,),
    read=read_parquet,
    count=lambda source: open_parquet(source.path, is_footer_enough=True).metadata.num_rows,
    metadata_of=("webdataset", "tfrecord", "array_record"),
)
