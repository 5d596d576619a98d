"""Files of img2dataset next to images: a parquet file with metadata, and statistics.

A shard of img2dataset's is

    00000.tar           read by diht_jax.readers.webdataset; in the output format "tfrecord"
                        00000.tfrecord instead, read by diht_jax.readers.records
    00000.parquet       the rows of the shard, those that could not be downloaded too; in the output
                        format "parquet" it holds the images as well, and there is no tar
                        (diht_jax.readers.parquet reads those)
    00000_stats.json    rows, successes, and how the others failed
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping
from typing import Any

from absl import logging

from diht_jax.readers.base import IMAGE_EXTENSIONS, SourceShard
from diht_jax.readers.parquet import (
    SUFFIX,
    BadRow,
    clean_row,
    explain_errors,
    open_parquet,
    read_rows,
)
from diht_jax.readers.webdataset import TAR_SUFFIXES
from diht_jax.storage import files
from diht_jax.storage.retries import StorageError, is_missing
from diht_jax.storage.stores import check_ordinary

COUNTS = ("count", "successes", "failed_to_download", "failed_to_resize")

TFRECORD_SUFFIX = ".tfrecord"

_CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT")  # what the tar has already
_MAX_STATUSES = 50


def read_download_stats(source: SourceShard) -> dict[str, Any] | None:
    """Counts of img2dataset for a shard that it downloaded.

    Returns:
        The counts of `COUNTS` and "status_dict", the most frequent outcomes; None where there are
        no statistics.

    Raises:
        ValueError: the file is damaged.
    """
    path = f"{_stem(source.path)}_stats.json"
    try:
        check_ordinary(path)
        stats = json.loads(files.read_bytes(path))
        statuses = collections.Counter({str(k): int(v) for k, v in stats["status_dict"].items()})
        counts = {name: int(stats[name]) for name in COUNTS}
    except FileNotFoundError:
        return None
    except StorageError:
        raise
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
    """The metadata of a tar's pairs by key, from the parquet file next to it.

    Returns:
        Nothing where there is no such file, or one without keys.

    Raises:
        ValueError: the file is damaged.
    """
    path = _stem(source.path) + SUFFIX
    if not source.path.endswith(TAR_SUFFIXES):
        return {}
    try:
        file = open_parquet(path)
    except OSError as error:
        if is_missing(error):
            return {}
        raise
    names = file.schema_arrow.names
    if "key" not in names:
        return {}
    wanted = [name for name in names if name not in IMAGE_EXTENSIONS]
    rows, bad = {}, []
    with explain_errors(path, lambda: "damaged"):
        for row in read_rows(path, file, wanted):
            if isinstance(row, BadRow):
                bad.append(row.detail)
                row = row.values
            rows[str(row.get("key"))] = clean_row(row, ("key", *_CAPTION_COLUMNS))
    if bad:
        logging.warning("%d pairs lack a value that cannot be read, such as %s", len(bad), bad[0])
    return rows


def _stem(path: str) -> str:
    suffixes = (*TAR_SUFFIXES, TFRECORD_SUFFIX, SUFFIX)
    return next((path.removesuffix(s) for s in suffixes if path.endswith(s)), path)
