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
    """A format of shards.

    Attributes:
        suffix: ending of the names of its shards.
        source: random access to the records of many shards; its `kind` is the name in `catalog`.
        writer: of one shard.
        tfds_name: what TFDS calls it; None where it does not read it.
    """

    suffix: str
    source: type[ShardedRecords]
    writer: type[RecordWriter]
    tfds_name: str | None = None


# By the values of `config.output_format`.
FORMATS = {
    "tfrecord": ShardFormat(".tfrecord", TFRecordSource, TFRecordWriter, "tfrecord"),
    "array_record": ShardFormat(
        ".array_record", ArrayRecordSource, ArrayRecordWriter, "array_record"
    ),
    "webdataset": ShardFormat(".tar", TarRecordSource, TarWriter),
}
# The format of a kind of shards.
_NAME_OF = {form.source.kind: name for name, form in FORMATS.items()}


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
    return FORMATS[_NAME_OF[found.kind]].source(found)


def open_writer(path: str | os.PathLike[str]) -> RecordWriter:
    """A writer of one shard, such as `TFRecordWriter`, by the name of the shard or its URL."""
    name = name_format(os.fspath(path))
    if name is None:
        suffixes = ", ".join(form.suffix for form in FORMATS.values())
        raise ValueError(f"{path}: not the name of a shard; expected one that ends in {suffixes}")
    return FORMATS[name].writer(path)


def name_format(path: str) -> str | None:
    """The format of a shard by its name alone; None where it is no name of a shard."""
    return _NAME_OF.get(catalog.kind_of(path))


def format_of(paths: Paths) -> str:
    """The format of the shards that some paths lead to, a key of `FORMATS`.

    Args:
        paths: see `open_source`. A single file of another name is taken for TFRecord.

    Raises:
        ShardsNotFoundError: see `open_source`.
    """
    return _NAME_OF[catalog.find_kind(paths)]
