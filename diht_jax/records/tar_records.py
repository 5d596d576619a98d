"""Webdataset tars as record shards: an index of their samples, random access, and a writer.

An element is a piece of the archive, from the first header of one pair to that of the next pair;
its first sample is the record. The index (`ShardIndex`) leaves out samples without image or caption
and those with a repeated key. `tars.py` defines what the members mean. The records equal the pairs
that the reader of tars gives for the same samples. A tar has checksums of its headers only. The
writer here adds checksums of the contents, which every reader here compares. In tars of other
writers, damaged contents are noticed only if they cannot be decoded.

A record is written as `KEY.jpg` (or `png`, `webp`, by the first bytes of its image), `KEY.txt` with
the caption, and `KEY.json` with the metadata and the key, as open_clip and the readers expect. In
KEY, dots and characters that paths cannot have are percent-encoded. A repeated key gets `~2`, `~3`
and so on. Headers have no owner and no time, so equal records give equal bytes. The first header of
a sample has the sizes and CRC-32 of its members.
"""

from __future__ import annotations

import collections
import io
import json
import pathlib
import re
import tarfile

import numpy as np
from absl import logging

from diht_jax.records import schema, tars
from diht_jax.records.samples import IMAGE_EXTENSIONS, SampleError, Skipped
from diht_jax.records.shard_files import DamagedRecordError, RecordWriter, ShardIndex, TFRecordError
from diht_jax.records.sharded import OpenShard, ShardedRecords
from diht_jax.records.tars import state_checksums, walk_members
from diht_jax.storage.stores import check_failure, open_file

_BLOCK_BYTES = 512  # headers and contents begin at multiples of this
# A plain tar begins with the name of its first member, which may be BZ001.jpg.
_COMPRESSED = {
    "gzip": b"\x1f\x8b",
    "bzip2": b"BZh[1-9]1AY&SY",
    "xz": b"\xfd7zXZ\0",
    "zstd": b"\\(\xb5/\xfd",
}
# First bytes of the image formats that webdataset supports.
_SIGNATURES = ((b"\xff\xd8", 0, "jpg"), (b"\x89PNG", 0, "png"), (b"WEBP", 8, "webp"))
_MAX_KEY_LETTERS = 200


def scan_tar(path: str) -> np.ndarray:
    """Finds where the samples of a tar begin, uint64 [n], local or in a store; skips the images.

    Logs samples that are not pairs.

    Raises:
        TFRecordError: the tar is compressed, damaged or cut off.
        StorageError: the tar cannot be read, even after retries.
    """
    offsets: list[int] = []
    skipped: collections.Counter[str] = collections.Counter()
    with open_file(path) as file:
        start = file.read(10)
        compression = next((n for n, form in _COMPRESSED.items() if re.match(form, start)), None)
        if compression is not None:
            raise TFRecordError(
                f"{path}: a tar that is compressed ({compression}) has no random access; unpack it "
                "to a plain .tar, or make record shards of it by `python -m data_prep.filter "
                "--config prep/convert`"
            )
        members = walk_members(
            file,
            path,
            tars.size_limit,
            is_divisible=True,
            is_read=lambda name: tars.split_name(name)[1] not in IMAGE_EXTENSIONS,
        )
        try:
            for offset, entry in tars.make_pairs(tars.group_members(members)):
                if isinstance(entry, Skipped):
                    skipped[entry.reason] += 1
                else:
                    offsets.append(offset)
        except ValueError as error:
            check_failure(file)  # raises if only the storage failed
            raise TFRecordError(str(error)) from error
    if skipped:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(skipped.items()))
        logging.warning("%s: %d samples are left out: %s", path, skipped.total(), counts)
    return np.array(offsets, np.uint64)


INDEX = ShardIndex(b"DIHTTAR1", _BLOCK_BYTES, _BLOCK_BYTES, is_gapless=False, scan=scan_tar)


class _TarShard(OpenShard):
    index = INDEX


class TarRecordSource(ShardedRecords):
    """Random access to the samples of many tars, in the order of the tars.

    Like `TFRecordSource`. A missing index is built, and kept next to its tar if the folder is
    writable, else in memory.
    """

    kind = "webdataset"
    shard_type = _TarShard

    @staticmethod
    def decode(element: bytes) -> schema.Record:
        """Decodes the record in an element.

        Raises:
            SampleError: the sample is not a pair.
            DamagedRecordError: the header is missing or damaged.
        """
        limit = tars.size_limit
        try:
            members = walk_members(io.BytesIO(element), "a tar", limit, is_piece=True)
            sample = next(tars.group_members(members), None)
        except ValueError as error:
            raise DamagedRecordError(str(error)) from error
        if sample is None or sample.offset:
            raise DamagedRecordError("a tar: no sample begins where the index states one")
        pair = tars.make_pair(sample)
        if isinstance(pair, Skipped):
            raise SampleError(pair)
        return schema.Record(pair.key, pair.image, pair.caption, pair.metadata)


class TarWriter(RecordWriter):
    """Writes one tar of records, and its index."""

    index = INDEX

    def _open(self, path: pathlib.Path) -> None:
        self._tar = tarfile.open(path, "x", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._seen: collections.Counter[str] = collections.Counter()

    def _append(self, data: bytes) -> None:
        record = schema.decode_record(data)
        if any(
            getattr(record, name) is not None for pair in schema.CONCEPT_FIELDS for name in pair
        ):
            raise ValueError(
                f"record '{record.key}': its concepts cannot be kept in a tar; write labelled "
                'records with config.output_format="tfrecord" or "array_record"'
            )
        extension = image_extension(record.image)
        if extension is None:
            raise ValueError(f"record '{record.key}': tars hold images in JPEG, PNG and WebP only")
        stem = member_stem(record.key)
        self._seen[stem] += 1
        if self._seen[stem] > 1:
            stem = f"{stem}~{self._seen[stem]}"  # no other stem has a tilde
        self._offsets.append(self._tar.offset)
        metadata = dict(record.metadata) | {"key": record.key}
        text = json.dumps(metadata, sort_keys=True, allow_nan=False)
        # Readers strip one byte order mark, so a caption that begins with one gets another.
        codec = "utf-8-sig" if record.caption.startswith("\ufeff") else "utf-8"
        caption = record.caption.encode(codec)
        members = {extension: record.image, "txt": caption, "json": text.encode()}
        headers = state_checksums(members)
        for name, contents in members.items():
            info = tarfile.TarInfo(f"{stem}.{name}")
            info.size, info.pax_headers, headers = len(contents), headers, {}
            self._tar.addfile(info, io.BytesIO(contents))
            self._tar.members.clear()  # ty: ignore[missing-attribute] only needed for reading

    def _finish(self) -> None:
        self._tar.close()


def image_extension(image: bytes) -> str | None:
    """Returns webdataset's extension for an image: jpg, png or webp; None for other formats."""
    for signature, start, extension in _SIGNATURES:
        if image[start : start + len(signature)] == signature:
            return extension
    return None


def member_stem(key: str) -> str:
    """Returns the name of a record's members, without their extension."""
    encoded = ""
    for letter in key:
        is_plain = letter not in ".%~\\" and letter.isprintable() and letter != "\ufeff"
        encoded += letter if is_plain else "".join(f"%{byte:02X}" for byte in letter.encode())
    if encoded != encoded.strip():
        encoded = encoded.replace(" ", "%20")
    # No path in the archive may leave the folder that it is unpacked in.
    stem = "/".join(part or "%2F" for part in encoded.split("/"))
    return stem if len(stem) <= _MAX_KEY_LETTERS else stem[:_MAX_KEY_LETTERS].rstrip("/")
