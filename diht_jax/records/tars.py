"""Webdataset tars: reading the members of an archive, and grouping them into samples and pairs.

Grouping follows webdataset: consecutive members with the same name up to the first dot of the base
name are one sample, such as `KEY.jpg`, `KEY.txt` and `KEY.json`, as img2dataset writes them.

Nothing is written to disk, so paths in an archive can do no harm. Python's `tarfile` trusts the
headers. It allocates any size that an extended header claims, searches the header with patterns of
quadratic time, goes backwards at a negative size, and takes a damaged header or a hole of zeros for
the end. Here, each of these is an error, and so is an archive that expands excessively.
"""

from __future__ import annotations

import os
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from diht_jax.records.samples import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Pair,
    Skipped,
    clean_text,
    take_caption,
)
from diht_jax.storage.files import parse_json
from diht_jax.storage.stores import check_failure, is_storage_failure, open_file

TEXT_EXTENSIONS = ("txt", "json")
_SIZE_LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_IMAGE_BYTES) | dict.fromkeys(
    TEXT_EXTENSIONS, 2**24
)
# A file that unpacks to more than this, and more than this many times its size, is rejected, since
# pictures are compressed already.
_UNPACKED_BYTES = 2**30
_MAX_EXPANSION = 200

# Fits names of 4,096 bytes and some attributes; `tarfile` takes a second to search such a header.
_MAX_EXTENDED_BYTES = 2**14
_EXTENDED_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_CHUNK_BYTES = 2**20

# Field in the extended header of a sample's first member with the checksums of all its members, as
# "EXTENSION:BYTES:CRC32" separated by blanks. A member with another size was edited later and is
# not checked.
CHECKSUMS = "DIHT.crc32"


class ExpansionError(ValueError):
    """A file unpacks to far more than its size; the message names it."""


class DamagedTarError(ValueError):
    """An archive cannot be read to its end; `member` is the incomplete member, if known."""

    def __init__(self, message: str, member: str | None = None):
        super().__init__(message)
        self.member = member


def check_expansion(path: str, num_bytes: int, unpacked_bytes: int) -> None:
    """Raises ExpansionError for a file that unpacks to too much, such as a decompression bomb.

    `unpacked_bytes` counts what was unpacked so far.
    """
    limit = max(_UNPACKED_BYTES, _MAX_EXPANSION * num_bytes)
    if unpacked_bytes > limit:
        raise ExpansionError(
            f"{path}: unpacks to over {limit >> 20} MiB, more than {_MAX_EXPANSION} times its "
            "size; no file of pictures does"
        )


class Member(NamedTuple):
    """An ordinary file in an archive."""

    offset: int  # of its first header in the (unpacked) archive
    name: str  # including its folders
    # Contents; None if they are over the limit, empty if they were not wanted.
    data: bytes | None
    # Whether the contents differ from the checksum that was written for them.
    is_damaged: bool = False


def read_members(path: str, size_limit: Callable[[str], int | None]) -> Iterator[Member]:
    """Yields the ordinary files of an archive, in order.

    Args:
        path: path of the archive, plain or compressed.
        size_limit: maps a member's name to the largest size to read; None skips the member.

    Raises:
        DamagedTarError: the archive is damaged, cut off, or continues after its end marker. All
            whole members before the damage were yielded. Names the archive.
        ExpansionError: the archive unpacks to far more than its size; names the archive.
        StorageError: the archive cannot be read, even after retries; names the archive.
    """
    with open_file(path) as file:
        try:
            yield from walk_members(file, path, size_limit)
        except ValueError:
            check_failure(file)  # raises if only the storage failed
            raise


def walk_members(
    file: BinaryIO,
    path: str,
    size_limit: Callable[[str], int | None],
    *,
    is_piece: bool = False,
    is_divisible: bool = False,
    is_read: Callable[[str], bool] | None = None,
) -> Iterator[Member]:
    """Yields the ordinary files of an open archive, in order; see `read_members`.

    Args:
        file: the archive. With `is_piece`, it is a piece that may lack the end marker.
        is_divisible: requires that the members mean the same when read one by one.
        is_read: whether to read the contents of a name within the limit; None reads all.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    contents_bytes = 0
    checksums: Mapping[str, tuple[int, int]] = {}
    unread = None  # the member whose contents were not read yet
    try:
        with tarfile.open(path, "r:*", fileobj=file, tarinfo=_BoundedInfo) as tar:
            position = -1
            while (member := tar.next()) is not None:
                unread = member.name
                tar.members.clear()  # ty: ignore[missing-attribute]  (kept for random access)
                if tar.offset <= position:
                    raise tarfile.ReadError(f"the size of '{member.name}' leads backwards")
                position = tar.offset
                if tar.fileobj is not file:  # compressed; `position` counts unpacked bytes
                    check_expansion(path, num_bytes, position)
                limit = size_limit(member.name) if member.isreg() else None
                if limit is None:
                    continue
                # The size is checked first: a sparse member may claim terabytes of zeros.
                is_wanted = 0 <= member.size <= limit
                contents_bytes += member.size if is_wanted else 0
                check_expansion(path, num_bytes, contents_bytes)
                if CHECKSUMS in member.pax_headers:
                    checksums = _parse_checksums(member)
                data, is_damaged = None, False
                if is_wanted and (is_read is None or is_read(member.name)):
                    contents = tar.extractfile(member)
                    data, unread = b"" if contents is None else contents.read(), None
                    size, crc = checksums.get(member.name, (None, None))
                    is_damaged = size == len(data) and crc != zlib.crc32(data)
                elif is_wanted:
                    data = b""
                yield Member(member.offset, member.name, data, is_damaged)
            _check_end(tar, is_piece, is_divisible)
    except (ExpansionError, MemoryError):
        raise
    except Exception as error:  # parsing damaged headers raises nearly any type
        if is_storage_failure(error):  # the archive itself may be intact
            raise
        raise DamagedTarError(
            f"{path}: the tar archive cannot be read to its end ({type(error).__name__}: {error}); "
            "download or write it again",
            unread,
        ) from error


def state_checksums(members: Mapping[str, bytes]) -> dict[str, str]:
    """Returns the extended header for the first of a sample's members, given by extension."""
    stated = (f"{name}:{len(data)}:{zlib.crc32(data):08x}" for name, data in members.items())
    return {CHECKSUMS: " ".join(stated)}


def _parse_checksums(member: tarfile.TarInfo) -> dict[str, tuple[int, int]]:
    """Returns member name -> (size, checksum) for a sample, as its first header states them."""
    stem = member.name.rpartition(".")[0]
    fields = re.findall(r"(\w+):(\d+):([0-9a-f]{8})\b", member.pax_headers[CHECKSUMS], re.ASCII)
    return {f"{stem}.{name}": (int(size), int(crc, 16)) for name, size, crc in fields}


class _BoundedInfo(tarfile.TarInfo):
    """A header whose size is checked before `tarfile` uses it."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise tarfile.ReadError(f"a member of {info.size} bytes")
        if info.type in _EXTENDED_TYPES and info.size > _MAX_EXTENDED_BYTES:
            raise tarfile.ReadError(
                f"an extended header of {info.size} bytes; at most {_MAX_EXTENDED_BYTES} are read"
            )
        return info


def _check_end(tar: tarfile.TarFile, is_piece: bool, is_divisible: bool) -> None:
    """Raises if the archive continues or is cut off here; reads a compressed one to its end."""
    if is_divisible and tar.pax_headers.keys() - {"comment"}:
        names = ", ".join(sorted(tar.pax_headers))
        raise tarfile.ReadError(f"it has a global header ({names}), so has no index")
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE and not (is_piece and not block):
        raise tarfile.ReadError(f"cut off at byte {tar.offset}, where an end marker should be")
    if any(block):
        raise tarfile.ReadError(f"damaged member header at byte {tar.offset}")
    while block:
        block = tar.fileobj.read(_CHUNK_BYTES)
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"more data behind the end marker at byte {tar.offset}: a hole in the file, or "
                "archives one after the other, which `tar --concatenate` joins"
            )


class Sample(NamedTuple):
    """The members of one sample."""

    offset: int  # of its first header in the archive
    key: str  # the common name
    # (lower-case extension, contents) pairs. Contents are None if they are over the limit, or for
    # a second image or a second member with the same extension.
    members: list[tuple[str, bytes | None]]
    damaged: list[str]  # names of the members with a wrong checksum


def size_limit(name: str) -> int | None:
    """Returns the largest size of an image or text that is worth reading, by its member's name.

    0 means that only the name matters; None means that the member is ignored.
    """
    stem, extension = split_name(name)
    if not stem or extension.rpartition(".")[2] not in _SIZE_LIMITS:
        return None
    # A member with an extension of several parts ("mask.png") is of another kind.
    return _SIZE_LIMITS.get(extension, 0)


def group_members(members: Iterable[Member]) -> Iterator[Sample]:
    """Groups members into samples; of a damaged archive, yields the whole ones before the error."""
    sample, has_image, before = None, False, None
    try:
        for offset, name, data, is_damaged in members:
            stem, extension = split_name(name)
            if sample is None or stem != sample.key:
                if sample is not None:
                    yield sample
                sample, has_image, before = Sample(offset, stem, [], []), False, sample
            is_image_too = extension in IMAGE_EXTENSIONS
            if (is_image_too and has_image) or extension in dict(sample.members):
                data = None
            has_image |= is_image_too
            sample.members.append((extension, data))
            if is_damaged:
                sample.damaged.append(name)
    except DamagedTarError as error:
        if sample is not None and _is_whole(sample, before, error.member):
            yield sample
        raise
    if sample is not None:
        yield sample


def _is_whole(sample: Sample, before: Sample | None, damaged: str | None) -> bool:
    """Returns whether the last sample before the damage has all of its members."""
    if damaged is not None:
        return split_name(damaged)[0] != sample.key
    # The next member is unknown; compare with the extensions of the previous sample.
    return before is not None and set(dict(before.members)) <= set(dict(sample.members))


def make_pairs(samples: Iterable[Sample]) -> Iterator[tuple[int, Pair | Skipped]]:
    """Yields the pairs of one archive's samples with their offsets; repeated keys are skipped."""
    seen: set[str] = set()
    for sample in samples:
        if sample.key in seen:
            yield sample.offset, Skipped(sample.key, "duplicate", "the key was there before")
            continue
        seen.add(sample.key)
        yield sample.offset, make_pair(sample)


def make_pair(
    sample: Sample,
    image_extensions: Collection[str] = IMAGE_EXTENSIONS,
    needs_caption: bool = True,
) -> Pair | Skipped:
    """Makes a pair of a sample, or explains why it is not one.

    The caption is the `txt`, or else "caption" of the `json`. The other fields of the `json` become
    the metadata. Members of other kinds are ignored.
    """
    key, members = sample.key, sample.members
    texts, names, images = dict(members), [], []
    for extension, data in members:
        names.append(extension)
        images += [data] if extension in image_extensions else []
    if sample.damaged:
        return Skipped(key, "bad_row", f"the checksum of {', '.join(sample.damaged)} is wrong")
    if not images:
        return Skipped(key, "no_image", f"found only {', '.join(names)}")
    if len(images) > 1 or len(set(names)) < len(names):
        return Skipped(key, "duplicate", f"found {', '.join(names)}")
    if images[0] is None:
        return Skipped(key, "too_large", f"an image file of over {MAX_IMAGE_BYTES} bytes")
    metadata: dict[str, Any] = {}
    if stated := texts.get("json"):
        try:
            metadata = parse_json(stated)
        except ValueError as error:
            return Skipped(key, "bad_json", str(error))
    caption, metadata = take_caption(texts.get("txt"), metadata)
    if caption is None and needs_caption:
        return Skipped(key, "no_caption", "neither a txt nor a json has one")
    return Pair(key, images[0], caption or "", metadata)


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name into sample key and lower-case extension; the key may be ""."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (clean_text(f"{folder}{slash}{stem}") if stem else ""), extension.lower()
