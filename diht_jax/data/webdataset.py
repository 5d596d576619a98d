"""Webdataset tars, as img2dataset writes them: `KEY.jpg`, `KEY.txt` and `KEY.json` in a row.

Called through `readers.py`. The archive is read from front to back; nothing in it is ever written
to disk, so that no path in it can do harm.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from typing import Any

from diht_jax.data.schema import Pair
from diht_jax.data.source import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Skipped,
    clean_text,
    merge_captions,
    parse_json_object,
    pick_captions,
)

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_TEXT_EXTENSIONS = ("txt", "json")
_SIZE_LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_IMAGE_BYTES) | dict.fromkeys(
    _TEXT_EXTENSIONS, 2**24
)
_BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)


def read_tar(path: str) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one tar, in its order.

    Members that follow each other with the same name up to the first dot of the base name are one
    entry, as webdataset groups them. The caption is the `txt`, or else "caption" of the `json`,
    whose other fields become the metadata. Members of other kinds are ignored.

    Args:
        path: of the archive, plain or compressed with gzip.

    Raises:
        ValueError: the archive is damaged or cut off.
    """
    seen: set[str] = set()
    for key, members in _read_groups(path):
        if key in seen:
            yield Skipped(key, "duplicate", "the key was there before")
            continue
        seen.add(key)
        yield _make_pair(key, members)


def _make_pair(key: str, members: list[tuple[str, bytes | None]]) -> Pair | Skipped:
    images = [data for extension, data in members if extension in IMAGE_EXTENSIONS]
    texts = dict(member for member in members if member[0] in _TEXT_EXTENSIONS)
    names = [extension for extension, _ in members]
    if not images:
        return Skipped(key, "no_image", f"found only {', '.join(names)}")
    if len(images) > 1 or len(set(names)) < len(names):
        return Skipped(key, "duplicate", f"found {', '.join(names)}")
    if images[0] is None:
        return Skipped(key, "too_large", f"an image file of over {MAX_IMAGE_BYTES} bytes")
    metadata: dict[str, Any] = {}
    if texts.get("json"):
        try:
            metadata = parse_json_object(texts["json"])
        except ValueError as error:
            return Skipped(key, "bad_json", str(error))
    in_json = pick_captions(metadata.pop("caption", None))
    captions = pick_captions((texts.get("txt") or b"").decode("utf-8-sig", "replace")) or in_json
    captions = pick_captions(captions + pick_captions(metadata.get("captions")))
    if not captions:
        return Skipped(key, "no_caption", "neither a txt nor a json has one")
    metadata.pop("key", None)
    return Pair(key, images[0], captions[0], merge_captions(metadata, captions))


def _read_groups(path: str) -> Iterator[tuple[str, list[tuple[str, bytes | None]]]]:
    """Yields (key, [(extension, contents, or None where too large)])."""
    key, members = None, []
    for name, extension, data in _read_members(path):
        if name != key:
            if members:
                yield key, members
            key, members = name, []
        members.append((extension, data))
    if members:
        yield key, members


def _read_members(path: str) -> Iterator[tuple[str, str, bytes | None]]:
    """Yields (key, extension, contents) of images and texts.

    Contents are None where they are too large, or where the extension has several parts
    ("KEY.mask.png"), which makes it another kind of member but still one to be named.
    """
    try:
        with tarfile.open(path, "r:*") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # kept for random access, which nobody needs here
                key, extension = _split_name(member.name)
                last_extension = extension.rpartition(".")[2]
                if not key or last_extension not in _SIZE_LIMITS:
                    continue
                if not member.isreg():
                    continue
                # The size is checked first: a sparse member may claim terabytes of zeros.
                is_wanted = member.size <= _SIZE_LIMITS.get(extension, 0)
                yield key, extension, tar.extractfile(member).read() if is_wanted else None
            _check_end(tar)
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise ValueError(
            f"{path}: the tar archive cannot be read to its end ({type(error).__name__}: {error}); "
            "download or write it again"
        ) from error


def _check_end(tar: tarfile.TarFile) -> None:
    # tarfile takes a damaged header, or none at all, for the end; only a block of zeros is one.
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut off at byte {tar.offset}, where an end marker should be")
    if any(block):
        raise tarfile.ReadError(f"damaged member header at byte {tar.offset}")


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (clean_text(f"{folder}{slash}{stem}") if stem else ""), extension.lower()
