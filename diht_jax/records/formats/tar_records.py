"""Webdataset tars as record shards: an index of their samples, and random access.

An element is a piece of the archive, from the first header of a sample to that of the next one that
is a pair; its first sample is the record. Samples without image or caption, and those whose key was
there before, are left out when the index is made (`shard_index.py`). What the members mean is
described in `tar_samples.py`; the same samples give the same records as the reader of tars gives
pairs. A tar has checksums of its headers alone: contents that were damaged are noticed where they
cannot be decoded.
"""

from __future__ import annotations

import collections
import io
from typing import BinaryIO

import numpy as np
from absl import logging

from diht_jax.records import schema
from diht_jax.records.format import DamagedRecordError, TFRecordError
from diht_jax.records.formats import tar_samples
from diht_jax.records.formats.shard_index import ShardIndex
from diht_jax.records.formats.tar_members import walk_members
from diht_jax.records.samples import SampleError, Skipped
from diht_jax.records.sharded import ShardedRecords
from diht_jax.storage.stores import check_failure, is_remote, open_file

BLOCK_BYTES = 512  # headers and contents begin at multiples of it
TAR_SUFFIX = ".tar"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


def scan_samples(file: BinaryIO, path: str) -> tuple[np.ndarray, collections.Counter[str]]:
    """Walks through a tar from header to header; images are not read.

    Args:
        file: the tar, open for reading and seeking.
        path: of the tar, for messages.

    Returns:
        uint64 [n], where each sample that is a pair begins; reason -> count of the others.

    Raises:
        TFRecordError: it is compressed, damaged or cut off.
    """
    compression = _COMPRESSED.get(file.read(2))
    if compression is not None:
        raise TFRecordError(
            f"{path}: a tar that is compressed ({compression}) has no random access; unpack it to "
            "a plain .tar, or make record shards of it by `python -m data_prep.filter --config "
            "configs/prep/convert.py`"
        )
    offsets: list[int] = []
    skipped: collections.Counter[str] = collections.Counter()
    try:
        members = walk_members(
            file,
            path,
            tar_samples.size_limit,
            is_divisible=True,
            is_read=lambda name: not tar_samples.is_image(name),
        )
        for offset, entry in tar_samples.make_pairs(tar_samples.group_members(members)):
            if isinstance(entry, Skipped):
                skipped[entry.reason] += 1
            else:
                offsets.append(offset)
    except ValueError as error:
        if isinstance(error, OSError):  # StorageError: the tar itself may be good
            raise
        raise TFRecordError(str(error)) from error
    return np.array(offsets, np.uint64), skipped


def _scan_piece(data: bytes, path: str) -> list[int]:
    """Where the pairs of a piece of a tar begin.

    A sample whose key was there before the piece counts as well. So these are the elements of the
    index only if there are as many.
    """
    try:
        members = walk_members(
            io.BytesIO(data),
            path,
            tar_samples.size_limit,
            is_piece=True,
            is_divisible=True,
            is_read=lambda name: not tar_samples.is_image(name),
        )
        pairs = tar_samples.make_pairs(tar_samples.group_members(members))
        return [offset for offset, entry in pairs if not isinstance(entry, Skipped)]
    except ValueError:
        return []


def decode_element(element: bytes, where: str = "a tar") -> schema.Record:
    """The record of an element.

    Args:
        element: a piece of a tar that begins with the first header of a sample.
        where: of the element, for messages.

    Raises:
        SampleError: the sample is no pair.
        DamagedRecordError: there is no header, or one is damaged.
    """
    try:
        members = walk_members(
            io.BytesIO(element), where, tar_samples.size_limit, is_piece=True, is_divisible=True
        )
        sample = next(tar_samples.group_members(members), None)
    except ValueError as error:
        raise DamagedRecordError(str(error)) from error
    if sample is None or sample.offset:
        raise DamagedRecordError(f"{where}: no sample begins where the index states one")
    pair = tar_samples.make_pair(sample)
    if isinstance(pair, Skipped):
        raise SampleError(pair)
    return schema.Record(pair.key, pair.image, pair.caption, pair.metadata)


def scan_tar(path: str) -> np.ndarray:
    """Where the samples of a tar begin, local or in a store; those that are no pairs are logged.

    Returns:
        uint64 [n].

    Raises:
        TFRecordError: it is compressed, damaged or cut off.
        StorageError: it cannot be read, now and after some attempts.
    """
    with open_file(path) as file:
        try:
            offsets, skipped = scan_samples(file, path)
        except TFRecordError:
            check_failure(file)  # the tar itself may be good
            raise
    if skipped:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(skipped.items()))
        logging.warning("%s: %d samples are left out: %s", path, skipped.total(), counts)
    return offsets


INDEX = ShardIndex(b"DIHTTAR1", BLOCK_BYTES, BLOCK_BYTES, is_gapless=False, scan=scan_tar)


class TarRecordSource(ShardedRecords):
    """Random access to the samples of many tars, in the order of the tars.

    As `TFRecordSource`, with one ranged request for a sample. An index that is missing is made, and
    kept next to its tar where the folder can be written, in memory where it cannot.
    """

    kind = "tar"
    index = INDEX

    @staticmethod
    def decode(element: bytes) -> schema.Record:
        """The record of an element; errors are those of `decode_element`."""
        return decode_element(element)

    def _starts_within(self, path: str, data: bytes) -> list[int]:
        # The offsets of a tar in a store may have to be requested, its headers are here.
        return [*_scan_piece(data, path), len(data)] if is_remote(path) else [0]
