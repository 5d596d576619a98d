"""Webdataset tars, as img2dataset writes them: `KEY.jpg`, `KEY.txt` and `KEY.json` in a row.

What the members mean is the matter of `records/formats/tar_samples.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from absl import logging

from diht_jax.readers.base import IMAGE_EXTENSIONS, Format, Skipped
from diht_jax.records.formats import tar_samples
from diht_jax.records.formats.tar_members import read_members
from diht_jax.records.schema import Pair
from diht_jax.storage.stores import is_remote

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


def read_tar(path: str) -> Iterator[Pair | Skipped]:
    """Yields the pairs of one tar, in its order, as `tar_samples.make_pair` makes them.

    Raises:
        ValueError: the archive is damaged, cut off, or several in one file.
    """
    members = read_members(path, tar_samples.size_limit)
    is_empty = True
    for _, entry in tar_samples.make_pairs(tar_samples.group_members(members)):
        is_empty = False
        yield entry
    if is_empty:
        logging.warning("%s: no pairs, since no member of the tar is a picture or a text", path)


def read_groups(
    path: str, limit_of: Callable[[str], int | None]
) -> Iterator[tuple[str, list[tuple[str, bytes | None]]]]:
    """Yields the entries of a tar, (key, [(extension, contents)]), as webdataset groups members.

    Args:
        limit_of: of an extension (lower case, maybe empty or of several parts), the bytes up to
            which such members are worth reading, 0 to be named only; None skips them.

    Returns:
        Contents are None where they are over the limit, and of a second image or a second member
        with the same extension of a key.
    """
    members = read_members(path, lambda name: tar_samples.size_limit(name, limit_of))
    for sample in tar_samples.group_members(members):
        yield sample.key, sample.members


def count_images(path: str) -> int | None:
    """Image members of a plain local tar, by their headers; None where these cannot be read."""
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    try:
        # No contents are wanted, of any size.
        members = read_members(path, lambda name: -1 if name.lower().endswith(suffixes) else None)
        return sum(1 for _ in members)
    except (ValueError, OSError):
        return None


FORMAT = Format(
    suffixes=TAR_SUFFIXES,
    read=lambda shard: read_tar(shard.path),
    count=lambda shard: (
        count_images(shard.path)
        if shard.path.endswith(".tar") and not is_remote(shard.path)
        else None
    ),
    count_reads_file=True,
)
