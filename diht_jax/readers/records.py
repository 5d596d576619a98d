"""TFRecord and ArrayRecord shards as a source, ours and img2dataset's."""

from __future__ import annotations

from collections.abc import Iterator

from diht_jax.readers.base import Format, SourceShard
from diht_jax.records import schema
from diht_jax.records.catalog import kind_of
from diht_jax.records.format import read_records
from diht_jax.records.formats.array_record import ArrayRecordSource, read_array_records
from diht_jax.records.samples import SampleError, Skipped, has_sample_fields
from diht_jax.records.schema import Pair
from diht_jax.records.tfrecord import INDEX, TFRecordSource
from diht_jax.storage.copies import local_copy
from diht_jax.storage.stores import input_size, is_remote


def read_shard(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one shard, in its order.

    Our records may share a key. Those of img2dataset may not, as in its tars.

    Raises:
        ValueError: a record is damaged or no pair; names file and record.
    """
    seen: set[str] = set()
    for number, data in enumerate(_read_bytes(shard.path)):
        try:
            fields = schema.parse_example(data)
            pair = schema.decode_fields(fields)
        except SampleError as error:
            yield error.skipped
            continue
        except ValueError as error:
            raise ValueError(f"{shard.path}: record {number}: {error}") from error
        if has_sample_fields(fields):
            if pair.key in seen:
                yield Skipped(pair.key, "duplicate", "the key was there before")
                continue
            seen.add(pair.key)
        yield pair


def _read_bytes(path: str) -> Iterator[bytes]:
    if kind_of(path) == ArrayRecordSource.kind:
        # Its library reads local files only, and begins at their end.
        with local_copy(path) as local:
            yield from read_array_records(local)
    else:
        yield from read_records(path)


def _count_records(shard: SourceShard) -> int | None:
    """Counts the records of a TFRecord shard; in a store by its index, if there is one."""
    if not is_remote(shard.path):
        return len(TFRecordSource([shard.path]))
    offsets = INDEX.load(shard.path, input_size(shard.path))
    return None if offsets is None else len(offsets)


ARRAY_RECORD = Format(
    suffixes=(".array_record",),
    matches=lambda path: kind_of(path) == ArrayRecordSource.kind,
    read=read_shard,
    count=lambda shard: None if is_remote(shard.path) else len(ArrayRecordSource([shard.path])),
)
FORMAT = Format(
    suffixes=(".tfrecord",),
    matches=lambda path: kind_of(path) == TFRecordSource.kind,  # train.tfrecord-00000-of-00010, too
    read=read_shard,
    count=_count_records,
)
