"""Webdataset tars, as img2dataset writes them: `KEY.jpg`, `KEY.txt` and `KEY.json` in a row.

How archives are read, damaged ones too, is the matter of `tar_files.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from diht_jax.data.readers.base import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Format,
    Skipped,
    clean_text,
    parse_json_object,
)
from diht_jax.data.readers.tar_files import read_members
from diht_jax.data.records.samples import take_caption
from diht_jax.data.records.schema import Pair

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")

_TEXT_EXTENSIONS = ("txt", "json")
_SIZE_LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_IMAGE_BYTES) | dict.fromkeys(
    _TEXT_EXTENSIONS, 2**24
)


def read_tar(path: str) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one tar, in its order.

    Members that follow each other with the same name up to the first dot of the base name are one
    entry, as webdataset groups them. The caption is the `txt`, or else "caption" of the `json`,
    whose other fields become the metadata. Members of other kinds are ignored.

    Args:
        path: of the archive, plain or compressed with gzip.

    Raises:
        ValueError: the archive is damaged, cut off, or several in one file.
    """
    seen: set[str] = set()
    for key, members in read_groups(path, _limit_of):
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
    caption, metadata = take_caption(texts.get("txt"), metadata)
    if caption is None:
        return Skipped(key, "no_caption", "neither a txt nor a json has one")
    return Pair(key, images[0], caption, metadata)


def read_groups(
    path: str, limit_of: Callable[[str], int | None]
) -> Iterator[tuple[str, list[tuple[str, bytes | None]]]]:
    """Yields the entries of a tar, (key, [(extension, contents)]), as webdataset groups members.

    Args:
        path: of the archive.
        limit_of: of an extension (lower case, maybe empty or of several parts), the bytes up to
            which such members are worth reading, 0 to be named only; None skips them.

    Returns:
        Contents are None where they are over the limit, and of a second image or a second member
        with the same extension of a key.
    """

    def size_limit(name: str) -> int | None:
        stem, extension = _split_name(name)
        return limit_of(extension) if stem else None

    key, members, has_image = None, [], False
    for name, data in read_members(path, size_limit):
        stem, extension = _split_name(name)
        if stem != key:
            if members:
                yield key, members
            key, members, has_image = stem, [], False
        is_image = extension in IMAGE_EXTENSIONS
        if (is_image and has_image) or extension in dict(members):
            data = None
        has_image |= is_image
        members.append((extension, data))
    if members:
        yield key, members


def _limit_of(extension: str) -> int | None:
    # An extension of several parts ("mask.png") makes it another kind of member, but still one to
    # be named.
    if extension.rpartition(".")[2] not in _SIZE_LIMITS:
        return None
    return _SIZE_LIMITS.get(extension, 0)


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (clean_text(f"{folder}{slash}{stem}") if stem else ""), extension.lower()


def count_images(path: str) -> int | None:
    """Image members of a plain tar, by their headers; None where these cannot be read."""
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    try:
        # No contents are wanted, of whatever size.
        members = read_members(path, lambda name: -1 if name.lower().endswith(suffixes) else None)
        return sum(1 for _ in members)
    except (ValueError, OSError):
        return None


FORMAT = Format(
    suffixes=TAR_SUFFIXES,
    read=lambda shard: read_tar(shard.path),
    count=lambda shard: count_images(shard.path) if shard.path.endswith(".tar") else None,
    count_reads_file=True,
)
