"""What a data set looked like when a checkpoint was saved, shard by shard.

It is kept in every checkpoint and compared when a run is resumed: the position in the data means
nothing once the data are others.
"""

from __future__ import annotations

import base64
import collections
import dataclasses
import hashlib
import os
import zlib

from absl import logging

from diht_jax.records.catalog import describe_stale
from diht_jax.records.sharded import ShardedRecords
from diht_jax.storage.files import map_many


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """The shards of a data set, in their order."""

    # Name (without folder), number of records, size in bytes, and a digest of 16 hex digits, for
    # every shard.
    shards: tuple[tuple[str, int, int, str], ...]

    @property
    def digest(self) -> str:
        """16 hex digits over all shards and their order."""
        return hashlib.sha256(_table(self.shards)).hexdigest()[:16]

    def pack(self) -> dict[str, int | str]:
        """A JSON-able form; 30 bytes a shard or less."""
        table = base64.b85encode(zlib.compress(_table(self.shards), 9)).decode()
        return {"num_shards": len(self.shards), "digest": self.digest, "table": table}

    @classmethod
    def unpack(cls, packed: dict[str, int | str]) -> Fingerprint:
        """The inverse of `pack`."""
        lines = zlib.decompress(base64.b85decode(str(packed["table"]))).decode().splitlines()
        rows = (line.rsplit("\t", 3) for line in lines)
        return cls(tuple((name, int(n), int(size), digest) for name, n, size, digest in rows))


def fingerprint_records(source: ShardedRecords) -> Fingerprint:
    """Looks at every shard that no `dataset.index` describes: two small reads each.

    A shard's digest covers where its records begin, hence the length of each of them, and its first
    and last 4 KiB. So it notices shards that are missing, new, renamed, in another order, or
    written again with other records, but not a changed byte in the middle; the records' checksums
    find that when they are read. Shards that are equal to another one are logged.
    """
    rows = list(map_many(source.identify, range(len(source.paths))))
    first: dict[tuple[int, int, str], str] = {}
    found = zip(source.paths, rows, strict=True)
    copies = [(p, first[row]) for p, row in found if row[0] and first.setdefault(row, p) != p]
    if copies:
        logging.warning(
            "%d shards look like copies of others, such as %s of %s: if a file was copied over "
            "another one, records are missing",
            len(copies),
            *copies[0],
        )
    names = map(os.path.basename, source.paths)
    return Fingerprint(tuple((name, *row) for name, row in zip(names, rows, strict=True)))


def describe_changes(before: Fingerprint, now: Fingerprint) -> list[str]:
    """The differences between the fingerprint of a checkpoint and that of now, in words."""
    if before == now:
        return []
    changes = describe_stale(_by_name(before), _by_name(now), is_whole=True)
    return changes or ["the same shards in another order"]


def _by_name(fingerprint: Fingerprint) -> dict[str, tuple[int, int, str]]:
    """Shards by name; of equal names in several folders, the second becomes `NAME (2)`."""
    seen: collections.Counter[str] = collections.Counter()
    shards = {}
    for name, count, size, digest in fingerprint.shards:
        seen[name] += 1
        shards[name if seen[name] == 1 else f"{name} ({seen[name]})"] = count, size, digest
    return shards


def _table(shards: tuple[tuple[str, int, int, str], ...]) -> bytes:
    return "".join("\t".join(map(str, shard)) + "\n" for shard in shards).encode()
