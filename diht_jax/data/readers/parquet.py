"""Parquet files with images, such as those of img2dataset's output format "parquet".

Images stand in a column named by their extension, captions in one of `CAPTION_COLUMNS`; the other
columns become metadata. Beside tars, img2dataset's parquet files hold metadata only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from diht_jax.data.readers.base import (
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
from diht_jax.data.records.schema import Pair

SUFFIX = ".parquet"
CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")

_BATCH_ROWS = 64  # images are held with them


def open_parquet(path: str) -> Any:
    """The `pyarrow.parquet.ParquetFile` at a path.

    Raises:
        ValueError: it cannot be read as one.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error


def read_parquet(source: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one file, in its order.

    Args:
        source: a whole parquet file.

    Raises:
        ValueError: the file is damaged, or has no column of images or of captions.
    """
    import pyarrow

    file = open_parquet(source.path)
    names = file.schema_arrow.names
    image_column = _find_column(source.path, names, IMAGE_EXTENSIONS, "images")
    caption_column = _find_column(source.path, names, CAPTION_COLUMNS, "captions")
    stem = os.path.basename(source.path).removesuffix(SUFFIX)
    seen: set[str] = set()
    number = 0
    try:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                key = clean_text(str(row.get("key") or "")) or f"{stem}-{number:08d}"
                number += 1
                if key in seen:
                    yield Skipped(key, "duplicate", "the key was there before")
                    continue
                seen.add(key)
                yield _make_pair(key, row, image_column, caption_column)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{source.path}: damaged at row {number} ({error})") from error


def _make_pair(
    key: str, row: dict[str, Any], image_column: str, caption_column: str
) -> Pair | Skipped:
    image = row[image_column]
    if not isinstance(image, bytes) or not image:
        status = row.get("error_message") or row.get("status") or "nothing in the column"
        return Skipped(key, "no_image", str(status))
    if len(image) > MAX_IMAGE_BYTES:
        return Skipped(key, "too_large", f"an image of {len(image)} bytes")
    captions = pick_captions(row[caption_column])
    if not captions:
        return Skipped(key, "no_caption", f"nothing in column '{caption_column}'")
    metadata = clean_row(row, ("key", image_column, caption_column))
    return Pair(key, image, captions[0], merge_captions(metadata, captions))


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
    count=lambda source: open_parquet(source.path).metadata.num_rows,
    metadata_of="webdataset",
)
