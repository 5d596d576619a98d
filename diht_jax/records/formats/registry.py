"""The formats of record shards, by the name that a config gives them; which one a file has."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from diht_jax.records import catalog
from diht_jax.records.catalog import Paths
from diht_jax.records.formats.array_record import ArrayRecordSource, ArrayRecordWriter
from diht_jax.records.formats.tar_records import TarRecordSource, TarWriter
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.tfrecord import TFRecordSource, TFRecordWriter


class ShardFormat(NamedTuple):
    """A format of shards."""

    # Random access to the records of many shards; its `kind` is the name of the format.
    source: type[ShardedRecords]
    writer: type[RecordWriter]  # of one shard
    tfds_name: str | None = None  # what TFDS calls it; None where it does not read it

    @property
    def suffix(self) -> str:
        """Ending of the names of its shards."""
        return catalog.SUFFIXES[self.source.kind]


# By the values of `config.output_format`.
FORMATS = {
    "tfrecord": ShardFormat(TFRecordSource, TFRecordWriter, "tfrecord"),
    "array_record": ShardFormat(ArrayRecordSource, ArrayRecordWriter, "array_record"),
    "webdataset": ShardFormat(TarRecordSource, TarWriter),
}


def check_format(name: str, allowed: Iterable[str] = FORMATS) -> None:
    """Raises ValueError for a `config.output_format` that is not one of those allowed."""
    if name not in allowed:
        raise ValueError(f"config.output_format='{name}'; expected one of {', '.join(allowed)}")


def open_source(paths: Paths) -> ShardedRecords:
    """The records of some shards, all of one format.

    Args:
        paths: a shard, a folder, a glob or a list of these; also their URLs.

    Raises:
        ShardsNotFoundError: nothing is found, several formats are, or tars that are compressed.
        ValueError: a shard or an index is broken.
    """
    found = catalog.open_catalog(paths)
    return FORMATS[found.kind].source(found)


def open_writer(path: str | os.PathLike[str]) -> RecordWriter:
    """A writer of one shard, such as `TFRecordWriter`, by the name of the shard or its URL."""
    kind = catalog.kind_of(os.fspath(path))
    if kind is None:
        suffixes = ", ".join(catalog.SUFFIXES.values())
        raise ValueError(f"{path}: not the name of a shard; expected one that ends in {suffixes}")
    return FORMATS[kind].writer(path)
