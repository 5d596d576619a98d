"""Samples of a webdataset tar: members that belong together, and the pair that they make.

As webdataset groups them, members that follow each other with the same name up to the first dot of
the base name are one sample: `KEY.jpg`, `KEY.txt` and `KEY.json`, as img2dataset writes them. How
archives are read, damaged ones too, is the matter of `tar_members.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from diht_jax.records.formats.tar_members import DamagedTarError, Member
from diht_jax.records.samples import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    Skipped,
    clean_text,
    take_caption,
)
from diht_jax.records.schema import Pair, parse_json_object

TEXT_EXTENSIONS = ("txt", "json")
_SIZE_LIMITS = dict.fromkeys(IMAGE_EXTENSIONS, MAX_IMAGE_BYTES) | dict.fromkeys(
    TEXT_EXTENSIONS, 2**24
)


class Sample(NamedTuple):
    """The members of one sample."""

    offset: int  # of its first header, in the archive
    key: str  # the common name
    # Extensions, in lower case, and contents; None in place of contents that are over the limit, of
    # a second image, or of a second member with the same extension.
    members: list[tuple[str, bytes | None]]
    damaged: list[str]  # names of the members whose contents are not those of their checksum


def sample_limit(extension: str) -> int | None:
    """The bytes up to which members of a sample are worth reading; 0 for those only named."""
    # An extension of several parts ("mask.png") makes it another kind of member, but still one to
    # be named.
    if extension.rpartition(".")[2] not in _SIZE_LIMITS:
        return None
    return _SIZE_LIMITS.get(extension, 0)


def size_limit(name: str, limit_of: Callable[[str], int | None] = sample_limit) -> int | None:
    """The bytes up to which a member is worth reading, by its name; None where it is no part.

    `limit_of` gives the same of an extension (lower case, maybe empty or of several parts).
    """
    stem, extension = _split_name(name)
    return limit_of(extension) if stem else None


def is_image(name: str) -> bool:
    """Returns whether a member is an image, by its name."""
    return _split_name(name)[1] in IMAGE_EXTENSIONS


def group_members(members: Iterable[Member]) -> Iterator[Sample]:
    """Yields the samples of an archive; of a damaged one those that are whole, before the error."""
    sample, has_image, before = None, False, None
    try:
        for offset, name, data, is_damaged in members:
            stem, extension = _split_name(name)
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
        return _split_name(damaged)[0] != sample.key
    # Nothing shows what came next; it is whole where it has all that the one before has.
    return before is not None and set(dict(before.members)) <= set(dict(sample.members))


def make_pairs(samples: Iterable[Sample]) -> Iterator[tuple[int, Pair | Skipped]]:
    """Yields the pairs of the samples of one archive, each with its offset; a key occurs once."""
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
    """The pair of a sample, or why it is none.

    The caption is the `txt`, or else "caption" of the `json`, whose other fields become the
    metadata. Members of other kinds are ignored.
    """
    key, members = sample.key, sample.members
    images = [data for extension, data in members if extension in image_extensions]
    texts = dict(member for member in members if member[0] in TEXT_EXTENSIONS)
    names = [extension for extension, _ in members]
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
            metadata = parse_json_object(stated)
        except ValueError as error:
            return Skipped(key, "bad_json", str(error))
    caption, metadata = take_caption(texts.get("txt"), metadata)
    if caption is None and needs_caption:
        return Skipped(key, "no_caption", "neither a txt nor a json has one")
    return Pair(key, images[0], caption or "", metadata)


def _split_name(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (clean_text(f"{folder}{slash}{stem}") if stem else ""), extension.lower()
