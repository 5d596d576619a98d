"""What img2dataset leaves beside images: parquet files with metadata or images, and statistics.

`sources.py` and `cat.py` call it. A shard of img2dataset's is

    00000.tar           read by diht_jax.data.readers.webdataset
    00000.parquet       the rows of the shard, those that could not be downloaded too; in the output
                        format "parquet" it holds the images as well, and there is no tar
    00000_stats.json    rows, successes, and how the others failed
"""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from diht_jax.data.readers.base import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Skipped,
    SourceShard,
    clean_text,
    merge_captions,
    parse_json_object,
    pick_captions,
)
from diht_jax.data.readers.webdataset import TAR_SUFFIXES
from diht_jax.data.records.schema import Pair

PARQUET_SUFFIX = ".parquet"
KIND = "parquet"

COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")

_CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")
_BATCH_ROWS = 64  # images are held with them
_MAX_STATUSES = 50


def read_download_stats(source: SourceShard) -> dict[str, Any] | None:
    """What img2dataset counted when it downloaded a shard.

    Args:
        source: a tar or parquet file of its output.

    Returns:
        The counts of `COUNTS` and "status_dict", the most frequent outcomes; None where there are
        no statistics.

    Raises:
        ValueError: the file is damaged.
    """
    path = f"{_stem(source.path)}_stats.json"
    try:
        with open(path, "rb") as file:
            stats = json.load(file)
        statuses = collections.Counter({str(k): int(v) for k, v in stats["status_dict"].items()})
        counts = {name: int(stats[name]) for name in COUNTS}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: not the statistics of img2dataset ({type(error).__name__}: {error}); delete "
            "the file to filter without them"
        ) from error
    return counts | {"status_dict": dict(statuses.most_common(_MAX_STATUSES))}


def merge_download_stats(total: dict[str, Any], other: Mapping[str, Any] | None) -> None:
    """Adds the counts of another shard to a dict that was empty at first."""
    if other is None:
        return
    for name in COUNTS:
        total[name] = total.get(name, 0) + other[name]
    statuses = collections.Counter(total.get("status_dict", {}))
    statuses.update(other["status_dict"])
    total["status_dict"] = dict(statuses.most_common(_MAX_STATUSES))


def read_sidecar(source: SourceShard) -> dict[str, dict[str, Any]]:
    """The metadata of a tar's pairs by key, from the parquet file beside it.

    Args:
        source: a tar of img2dataset's.

    Returns:
        Nothing where there is no such file, or one without keys.

    Raises:
        ValueError: the file is damaged.
    """
    path = _stem(source.path) + PARQUET_SUFFIX
    if not source.path.endswith(TAR_SUFFIXES) or not os.path.isfile(path):
        return {}
    file = open_parquet(path)
    names = file.schema_arrow.names
    if "key" not in names:
        return {}
    wanted = [name for name in names if name not in IMAGE_EXTENSIONS]
    return {
        str(row["key"]): _clean_row(row, ("key", *_CAPTION_COLUMNS))
        for batch in file.iter_batches(columns=wanted)
        for row in batch.to_pylist()
    }


def open_parquet(path: str) -> Any:
    """The `pyarrow.parquet.ParquetFile` at a path.

    Raises:
        ValueError: it is none.
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
    """The pairs of a parquet file with images, as img2dataset's output format "parquet".

    Args:
        source: of the kind "parquet".

    Raises:
        ValueError: the file is damaged, or has no column of images or of captions.
    """
    import pyarrow

    file = open_parquet(source.path)
    names = file.schema_arrow.names
    image_column = _find_column(source.path, names, IMAGE_EXTENSIONS, "images")
    caption_column = _find_column(source.path, names, _CAPTION_COLUMNS, "captions")
    stem = os.path.basename(_stem(source.path))
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
    metadata = _clean_row(row, ("key", image_column, caption_column))
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


def _clean_row(row: Mapping[str, Any], without: tuple[str, ...]) -> dict[str, Any]:
    """The other columns as JSON can hold them: no NaN, dates as text, no bytes."""
    kept = {k: v for k, v in row.items() if k not in without and v is not None}
    kept = {k: v for k, v in kept.items() if not isinstance(v, bytes)}
    return parse_json_object(json.dumps(kept, default=str))


def _stem(path: str) -> str:
    suffixes = (*TAR_SUFFIXES, PARQUET_SUFFIX)
    return next((path.removesuffix(s) for s in suffixes if path.endswith(s)), path)
