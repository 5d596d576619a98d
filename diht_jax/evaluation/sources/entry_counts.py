"""How many entries a source has, for progress bars: told by cheap means, estimated, or unknown.

Called by `sources`, `search` and `embedding_progress`. No image is read, and nothing that is
evaluated may depend on these numbers: they give a bar its end and its ETA.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from diht_jax.data.readers.base import IMAGE_EXTENSIONS, SourceShard, image_files
from diht_jax.data.readers.tar_files import read_members
from diht_jax.data.records.tfrecord import TFRecordSource


def count_entries(shards: Sequence[SourceShard]) -> int | None:
    """Entries of all shards; None where no shard tells."""
    sizes = [shard.identity()["size_bytes"] for shard in shards]
    return estimate_total(shard_lengths(shards), sizes)


def count_tars(paths: Sequence[str]) -> int | None:
    """Pictures in some tars, by the headers of the first one and the sizes of the others."""
    if not paths:
        return None
    lengths = [_count_pictures(paths[0]), *[None] * (len(paths) - 1)]
    return estimate_total(lengths, [os.path.getsize(path) for path in paths])


def shard_lengths(shards: Sequence[SourceShard]) -> list[int | None]:
    """Entries of each shard, None where it does not tell; of tars the first one is looked at."""
    lengths = [_length(shard) for shard in shards]
    if shards and not any(lengths) and shards[0].path.endswith(".tar"):
        lengths[0] = _count_pictures(shards[0].path)
    return lengths


def estimate_total(lengths: Sequence[int | None], sizes: Sequence[int]) -> int | None:
    """The sum of the lengths; those that are None are estimated from the others, by bytes."""
    known = [(n, b) for n, b in zip(lengths, sizes, strict=True) if n is not None]
    if not known:
        return None
    per_byte = sum(n for n, _ in known) / max(1, sum(b for _, b in known))
    pairs = zip(lengths, sizes, strict=True)
    return round(sum(size * per_byte if n is None else n for n, size in pairs))


def _length(shard: SourceShard) -> int | None:
    if shard.kind == "tfds":
        return shard.stop - shard.start
    if shard.kind == "tfrecord":
        return len(TFRecordSource([shard.path]))
    if shard.kind == "table":
        return _count_lines(shard)
    if os.path.isdir(shard.path):
        return len(image_files(shard.path))
    return None


def _count_lines(shard: SourceShard) -> int:
    """Lines of a table's part; a row of a csv that has line breaks in it counts too often."""
    with open(shard.path, "rb") as file:
        file.seek(shard.start)
        data = file.read(shard.stop - shard.start)
    return data.count(b"\n") + (bool(data) and not data.endswith(b"\n"))


def _count_pictures(path: str) -> int | None:
    """Image members of a plain tar, by their headers; None where these cannot be read."""
    suffixes = tuple(f".{extension}" for extension in IMAGE_EXTENSIONS)
    try:
        # No contents are wanted, of whatever size.
        members = read_members(path, lambda name: -1 if name.lower().endswith(suffixes) else None)
        return sum(1 for _ in members)
    except (ValueError, OSError):
        return None
