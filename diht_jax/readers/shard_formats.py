"""Shards of pairs as sources: webdataset tars, and TFRecord and ArrayRecord shards.

The members of a tar are consecutive `KEY.jpg`, `KEY.txt` and `KEY.json`, as img2dataset writes
them; `records/tars.py` defines their meaning. Record shards are ours or img2dataset's.
"""

from __future__ import annotations

from collections.abc import Iterator

from absl import logging

from diht_jax.readers.base import Format, SourceShard
from diht_jax.records import schema, tars
from diht_jax.records.formats import INDEX, ArrayRecordSource, TFRecordSource, read_array_records
from diht_jax.records.samples import IMAGE_EXTENSIONS, SampleError, Skipped
from diht_jax.records.schema import Pair, has_sample_fields
from diht_jax.records.shard_files import kind_of, read_records
from diht_jax.records.tars import read_members
from diht_jax.storage.copies import local_copy
from diht_jax.storage.stores import input_size, is_remote

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGE_SUFFIXES = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)


def read_tar(path: str) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one tar in order, as made by `tars.make_pair`.

    Raises:
        ValueError: the archive is damaged, cut off, or several archives in one file.
    """
    members = read_members(path, tars.size_limit)
    is_empty = True
    for _, entry in tars.make_pairs(tars.group_members(members)):
        is_empty = False
        yield entry
    if is_empty:
        logging.warning("%s: no pairs, since no member of the tar is a picture or a text", path)


def count_images(shard: SourceShard) -> int | None:
    """Counts the images of a tar by its headers; None if it is remote, compressed or damaged."""
    if is_remote(shard.path) or not shard.path.endswith(".tar"):
        return None
    try:
        # -1 lists the members without reading contents.
        members = read_members(
            shard.path, lambda name: -1 if name.lower().endswith(_IMAGE_SUFFIXES) else None
        )
        return len(list(members))
    except (ValueError, OSError):
        return None


def read_shard(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one shard, in order.

    Our records may share a key. Those of img2dataset must not, as in its tars.

    Raises:
        ValueError: a record is damaged or cannot be decoded; names file and record.
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
        # The library reads local files only, starting at their end.
        with local_copy(path) as local:
            yield from read_array_records(local)
    else:
        yield from read_records(path)


def _count_records(shard: SourceShard) -> int | None:
    """Counts the records of a TFRecord shard; in a store by its index, or None without one."""
    if not is_remote(shard.path):
        return len(TFRecordSource([shard.path]))
    offsets = INDEX.load(shard.path, input_size(shard.path))
    return None if offsets is None else len(offsets)


WEBDATASET = Format(
    suffixes=TAR_SUFFIXES,
    read=lambda shard: read_tar(shard.path),
    count=count_images,
    count_reads_file=True,
)
ARRAY_RECORD = Format(
    suffixes=(".array_record",),
    matches=lambda path: kind_of(path) == ArrayRecordSource.kind,
    read=read_shard,
    count=lambda shard: None if is_remote(shard.path) else len(ArrayRecordSource([shard.path])),
)
TFRECORD = Format(
    suffixes=(".tfrecord",),
    matches=lambda path: kind_of(path) == TFRecordSource.kind,  # train.tfrecord-00000-of-00010, too
    read=read_shard,
    count=_count_records,
)
