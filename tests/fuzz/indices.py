"""Index files that are damaged, or another shard's: never may a read give other bytes for it."""

from __future__ import annotations

import pathlib
import struct

from diht_jax.data.records.tfrecord import TFRecordSource
from tests.fuzz.cases import ERROR, SUCCESS, Draw, Refused, attempt, require
from tests.fuzz.framing import frame, index

_HEADER_BYTES = 24


class Shard:
    """A shard of random records, and the path of its index."""

    def __init__(self, draw: Draw, folder: pathlib.Path):
        count = draw.randint(2, 8)
        # Few lengths, so that two shards may well agree in some of their places.
        self.records = [draw.randbytes(draw.choice([1, 20, 20, 35])) for _ in range(count)]
        self.frames = [frame(data) for data in self.records]
        self.path = folder / "train-00000.tfrecord"
        self.path.write_bytes(b"".join(self.frames))
        self.index_path = pathlib.Path(f"{self.path}.idx")

    def judge(self, must_fail: bool) -> str:
        """Opens and reads the shard: every record is right, or an error names file and record."""
        source = attempt(lambda: TFRecordSource(str(self.path)), self.path)
        if isinstance(source, Refused):
            require(str(self.index_path) in source.message, f"not the index: {source.message}")
            return ERROR
        outcome = SUCCESS
        for number in range(len(source)):
            data = attempt(lambda number=number: source[number], self.index_path)
            if isinstance(data, Refused):
                outcome = ERROR
            else:
                known = number < len(self.records) and data == self.records[number]
                require(known, f"record {number} is another one")
        if outcome == SUCCESS:
            require(len(source) == len(self.records), "records are lost or made up")
        require(outcome == ERROR or not must_fail, "an index of another shard was believed")
        # As the message advises: without the index, everything is there.
        self.index_path.unlink()
        source = TFRecordSource(str(self.path))
        require([source[n] for n in range(len(source))] == self.records, "built index is wrong")
        return outcome


def _of_another_shard(draw: Draw, folder: pathlib.Path) -> str:
    shard = Shard(draw, folder)
    (folder / "other").mkdir()
    other = Shard(draw, folder / "other")
    shard.index_path.write_bytes(index(other.frames))
    return shard.judge(must_fail=list(map(len, shard.frames)) != list(map(len, other.frames)))


def _of_a_shard_of_the_same_size(draw: Draw, folder: pathlib.Path) -> str:
    """Records in another order: the same size and number, other places."""
    shard = Shard(draw, folder)
    frames = draw.sample(shard.frames, len(shard.frames))
    shard.index_path.write_bytes(index(frames))
    return shard.judge(must_fail=list(map(len, shard.frames)) != list(map(len, frames)))


def _damaged(draw: Draw, folder: pathlib.Path) -> str:
    shard = Shard(draw, folder)
    own = index(shard.frames)
    damaged = draw.damage(own)
    shard.index_path.write_bytes(damaged)
    return shard.judge(must_fail=damaged != own)


def _bits_flipped(draw: Draw, folder: pathlib.Path) -> str:
    shard = Shard(draw, folder)
    shard.index_path.write_bytes(draw.flip(index(shard.frames), 2))
    return shard.judge(must_fail=True)


def _odd_offsets(draw: Draw, folder: pathlib.Path) -> str:
    """Offsets beyond the end, giant ones, descending ones, repeated ones."""
    shard = Shard(draw, folder)
    own = index(shard.frames)
    count = len(shard.frames)
    offsets = list(struct.unpack(f"<{count}Q", own[_HEADER_BYTES:]))
    place = draw.randrange(count)
    offsets[place] = draw.choice([2**64 - 1, 2**63, 2**40, len(own) + 10**6, 0, offsets[place] + 1])
    if draw.random() < 0.3:
        draw.shuffle(offsets)
    changed = own[:_HEADER_BYTES] + struct.pack(f"<{count}Q", *offsets)
    shard.index_path.write_bytes(changed)
    return shard.judge(must_fail=changed != own)


def _odd_counts(draw: Draw, folder: pathlib.Path) -> str:
    """Fewer, more, or more records than any memory holds."""
    shard = Shard(draw, folder)
    own = index(shard.frames)
    count = draw.choice(
        [0, 1, len(shard.frames) - 1, len(shard.frames) + 1, 2**32, 2**61, 2**64 - 1]
    )
    body = own[_HEADER_BYTES:]
    if count < 100:
        body = (body + struct.pack("<Q", 7) * 2)[: 8 * count]
    changed = own[:16] + struct.pack("<Q", count) + body
    shard.index_path.write_bytes(changed)
    return shard.judge(must_fail=changed != own)


def _swapped_files(draw: Draw, folder: pathlib.Path) -> str:
    """The shard under the index's name."""
    shard = Shard(draw, folder)
    shard.index_path.write_bytes(shard.path.read_bytes())
    return shard.judge(must_fail=True)


MUTATIONS = {
    "another shard's": _of_another_shard,
    "a shard's of the same size": _of_a_shard_of_the_same_size,
    "damaged": _damaged,
    "bits flipped": _bits_flipped,
    "odd offsets": _odd_offsets,
    "odd counts": _odd_counts,
    "swapped files": _swapped_files,
}
