"""Parquet files with images, such as those of img2dataset's output format "parquet".

Images stand in a column named by their extension, or in one of the name "image", as bytes or as
Hugging Face's struct of bytes and path; captions in one of `CAPTION_COLUMNS`; the other columns
become metadata. A number in a column "label" gets its name from Hugging Face's description in the
file, where there is one. In a folder with tars,
img2dataset's parquet files hold metadata only.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diht_jax.readers.base import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Format,
    Skipped,
    SourceShard,
    clean_text,
    merge_captions,
    parse_json_object,
    pick_captions,
)
from diht_jax.records.formats.tar_members import ExpansionCheck
from diht_jax.records.schema import Pair
from diht_jax.storage.files import input_size
from diht_jax.storage.retries import is_storage_failure
from diht_jax.storage.stores import BLOCK_BYTES, StoreFile, check_failure, is_remote, open_file

SUFFIX = ".parquet"
IMAGE_COLUMNS = (*IMAGE_EXTENSIONS, "image")
CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")
LABEL_COLUMN = "label"

# Bytes of a column that Arrow reads at once, instead of all of it in a row group.
_BUFFER_BYTES = 2**20


_FOOTER_BYTES = 2**16  # the end of a file that Arrow reads first
_BUFFERED_BYTES = 2**16


def open_parquet(path: str, row_groups: tuple[int, int] | None = None) -> Any:
    """The `pyarrow.parquet.ParquetFile` at a path; its reads are tried again.

    Args:
        path: of the file, or its URL.
        row_groups: the first one and the end of those that will be read; all where None. No
            others are fetched of a file in a store; (0, 0) is for the footer alone.

    Raises:
        ValueError: it cannot be read as one.
        StorageError: it cannot be read, now and after some attempts.
    """
    import pyarrow
    import pyarrow.parquet

    if is_remote(path):
        file = io.BufferedReader(_ColumnsFile(path, row_groups == (0, 0)), _BUFFERED_BYTES)
    else:
        file = open_file(path)
    try:
        opened = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER_BYTES)
        if is_remote(path):
            file.raw.expect(opened.metadata, row_groups)
        return opened
    except (pyarrow.ArrowInvalid, OSError) as error:
        check_failure(file)
        if is_storage_failure(error):
            raise
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error


class _ColumnsFile(StoreFile):
    """A parquet file in a store, of which every block is fetched once.

    Arrow reads the columns of a row group in turns, so that blocks are kept for as long as a column
    may go on in them: those inside of a single column of a row group until the next one of it is
    read, all others until the row group after theirs has been reached.
    """

    def __init__(self, url: str, is_footer_only: bool):
        super().__init__(url)
        # Of a small file the whole is a single request.
        is_cut = is_footer_only or self.size > BLOCK_BYTES
        footer = max(0, self.size - _FOOTER_BYTES) if is_cut else 0
        self._borders = sorted({0, footer, self.size})
        self._is_planned = False
        self._last_wanted = 0
        self._chunks: list[tuple[int, int, int]] = []  # first byte, end, row group

    def expect(self, metadata: Any, row_groups: tuple[int, int] | None) -> None:
        """Cuts the bytes of the row groups that will be read into blocks, by the footer."""
        first, stop = row_groups or (0, metadata.num_row_groups)
        for number in range(first, stop):
            group = metadata.row_group(number)
            for index in range(group.num_columns):
                column = group.column(index)
                pages = [column.data_page_offset]
                if column.has_dictionary_page and column.dictionary_page_offset:
                    pages.append(column.dictionary_page_offset)
                begin = min(pages)
                self._chunks.append((begin, begin + column.total_compressed_size, number))
        self._chunks.sort()
        self._is_planned = True
        if not self._chunks or len(self._borders) == 2:  # a small file is there already
            return
        begin, end = self._chunks[0][0], max(end for _, end, _ in self._chunks)
        footer = self._borders[1]
        cuts = range(begin, min(end, footer), BLOCK_BYTES)
        self._borders = sorted({0, *cuts, min(end, footer), *self._borders[1:]})
        self._last_wanted = min(end, footer)

    def readinto(self, buffer: memoryview) -> int:
        if not self._is_planned and self._position < self._borders[1] < self.size:
            bisect.insort(self._borders, self._position)  # where a long footer begins
        return super().readinto(buffer)

    def _is_wanted(self, number: int) -> bool:
        return self._borders[number] < self._last_wanted

    def _forget(self, position: int) -> None:
        current = self._chunk(position)
        group = self._chunks[current][2] if self._chunks else 0
        for start in list(self._blocks):
            end = self._borders[self._borders.index(start) + 1]
            if start >= self._last_wanted:
                continue  # the footer
            first, last = self._chunk(start), self._chunk(end - 1)
            is_inside = first == last == current and end <= position
            if is_inside or self._chunks[last][2] + 1 < group:
                del self._blocks[start]

    def _chunk(self, position: int) -> int:
        """The number of the column of a row group that a byte belongs to."""
        return max(0, bisect.bisect_right(self._chunks, (position, self.size, 0)) - 1)


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
    for batch in file.iter_batches(batch_size=1, columns=columns, use_threads=False):
        yield from batch.to_pylist()


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
    expansion = ExpansionCheck(source.path, input_size(source.path))
    with explain_errors(source.path, lambda: f"damaged at row {number}"):
        for row in read_rows(file):
            key = clean_text(str(row.get("key") or "")) or f"{stem}-{number:08d}"
            number += 1
            if isinstance(row[image_column], dict):  # Hugging Face's struct
                row[image_column] = row[image_column].get("bytes")
            expansion.add(len(row[image_column] or b""))
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
    count=lambda source: open_parquet(source.path, (0, 0)).metadata.num_rows,
    metadata_of=("webdataset", "tfrecord", "array_record"),
)
