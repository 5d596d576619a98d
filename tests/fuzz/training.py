"""The training input on shards with some bad records, with `on_bad_record` "error" and "skip"."""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib

import numpy as np
from absl import logging
from PIL import Image

from diht_jax.data.pipeline import DecodeExample, TrainIterator, open_records
from tests.fuzz.cases import ERROR, SKIP, SUCCESS, Draw, Refused, attempt, require
from tests.fuzz.framing import example, frame, index

_SIDE = 4
# One epoch at least. (Of a dozen records grain takes milliseconds for each place of the order.)
_BATCH_SIZE, _BATCHES = 16, 4
_DECODE = DecodeExample(_SIDE, 8, (0.9, 1.0), "{caption}", num_concepts=3)


def prepare(base: pathlib.Path) -> None:
    """Every bad record is logged; there are many."""
    logging.set_verbosity(logging.ERROR)


@dataclasses.dataclass
class Shard:
    """A shard whose picture number i has the grey value i.

    Attributes:
        path: of the file.
        count: of all records.
        bad: numbers of those that cannot be used.
    """

    path: pathlib.Path
    count: int
    bad: set[int]

    @property
    def good(self) -> set[int]:
        """Numbers of the others."""
        return set(range(self.count)) - self.bad


def _fields(number: int) -> dict:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (number,) * 3).save(buffer, "PNG")
    return {"key": b"key%d" % number, "image": buffer.getvalue(), "caption": b"text"}


@functools.cache
def _good_frame(number: int) -> bytes:
    return frame(example(_fields(number)))


def _bad_frame(draw: Draw, number: int) -> bytes:
    """A frame of a record that is bad in one of many ways."""
    fields = _fields(number)
    image = fields["image"]
    form = draw.randrange(9)
    if form == 0:
        fields["image"] = draw.choice(
            [b"", b"no picture", image[: len(image) // 2], b"\xff\xd8\xff"]
        )
    elif form == 1:
        del fields[draw.choice(["key", "image", "caption"])]
    elif form == 2:
        fields["metadata"] = draw.choice([b"{", b"[]", b"[" * 100_000])
    elif form == 3:
        fields["object_ids"], fields["object_probs"] = [1, 2], [0.5]
    elif form == 4:
        fields["object_ids"], fields["object_probs"] = [1], [float("nan")]
    elif form == 5:
        return frame(draw.randbytes(40))
    elif form == 6:
        damaged = bytearray(frame(example(fields)))
        damaged[draw.randrange(12, len(damaged))] ^= 1 << draw.randrange(8)
        return bytes(damaged)
    elif form == 7:
        damaged = bytearray(frame(example(fields)))
        damaged[draw.randrange(12)] ^= 1 << draw.randrange(8)
        return bytes(damaged)
    else:
        fields["image"], fields["caption"] = fields["caption"], fields["image"]
    return frame(example(fields))


def make_shard(draw: Draw, folder: pathlib.Path, num_bad: int) -> Shard:
    """Some sixty records, with an index. No two bad ones lie side by side."""
    count = draw.randint(_BATCHES * _BATCH_SIZE - 12, _BATCHES * _BATCH_SIZE)
    start = draw.randrange(3)
    bad = set(draw.sample(range(start, count, 2), num_bad))
    frames = [_bad_frame(draw, n) if n in bad else _good_frame(n) for n in range(count)]
    path = folder / "pairs-train-00000.tfrecord"
    path.write_bytes(b"".join(frames))
    pathlib.Path(f"{path}.idx").write_bytes(index(frames))
    return Shard(path, count, bad)


def read(shard: Shard, mode: str, seed: int, batches: int = _BATCHES, **options):
    """Grey values of the first batches, [batches, b], and how many records were passed over."""
    iterator = TrainIterator(
        open_records(str(shard.path)),
        _DECODE,
        batch_size=_BATCH_SIZE,
        seed=seed,
        num_workers=0,
        on_bad_record=mode,
        **options,
    )
    try:
        found = [next(iterator) for _ in range(batches)]
        keys = [iterator.keys(number * _BATCH_SIZE) for number in range(batches)]
    finally:
        iterator.close()
    for batch in found:
        names = {
            "images",
            "tokens",
            *(f"{k}_{w}" for k in ("object", "attribute") for w in ("ids", "probs")),
        }
        require(batch.keys() == names, f"a batch of {sorted(batch)}")
        require(bool(np.isfinite(batch["object_probs"]).all()), "labels that are not finite")
    values = np.array([batch["images"][:, 0, 0, 0] for batch in found])
    require(
        [[f"key{v}" for v in row] for row in values] == keys, f"keys {keys}, but records {values}"
    )
    return values, iterator.passed_over


def _skip(draw: Draw, folder: pathlib.Path) -> str:
    """Every good record of the epoch comes; a bad one's place is taken by a good one."""
    shard = make_shard(draw, folder, draw.randint(1, 20))
    seed = draw.randrange(1000)
    values, passed_over = read(shard, "skip", seed)
    require(values.shape == (_BATCHES, _BATCH_SIZE), f"batches of {values.shape}")
    seen = set(values.flatten().tolist())
    require(seen == shard.good, f"lost {shard.good - seen}, bad {seen - shard.good}")
    require(passed_over >= len(shard.bad), f"{passed_over} counted of {len(shard.bad)}")
    again, counted = read(shard, "skip", seed)
    require(np.array_equal(values, again) and counted == passed_over, "another order the next time")
    return SKIP


def _skip_on_two_hosts(draw: Draw, folder: pathlib.Path) -> str:
    """Two processes give the batches of one."""
    shard = make_shard(draw, folder, draw.randint(1, 20))
    seed = draw.randrange(1000)
    values, passed_over = read(shard, "skip", seed)
    parts = [read(shard, "skip", seed, process_index=i, process_count=2) for i in range(2)]
    together = np.stack([part for part, _ in parts], axis=2).reshape(values.shape)
    require(np.array_equal(values, together), f"one host {values}, two hosts {together}")
    require(passed_over == sum(count for _, count in parts), "counted differently")
    return SKIP


def _good_records_keep_their_places(draw: Draw, folder: pathlib.Path) -> str:
    """The order is that of the undamaged shard but for the bad records' places."""
    shard = make_shard(draw, folder, draw.randint(1, 20))
    (folder / "whole").mkdir()
    path = folder / "whole" / shard.path.name
    path.write_bytes(b"".join(_good_frame(n) for n in range(shard.count)))
    seed = draw.randrange(1000)
    values, passed_over = read(shard, "skip", seed)
    whole, none = read(Shard(path, shard.count, set()), "skip", seed)
    require(none == 0, "good records were passed over")
    was_bad = np.isin(whole, list(shard.bad))
    require(np.array_equal(values[~was_bad], whole[~was_bad]), "good records have moved")
    require(passed_over >= was_bad.sum(), f"{passed_over} counted of {was_bad.sum()}")
    return SKIP


def _error(draw: Draw, folder: pathlib.Path) -> str:
    """By default the first bad record ends the run, which says where it lies."""
    shard = make_shard(draw, folder, 1)
    (bad,) = shard.bad
    result = attempt(lambda: read(shard, "error", draw.randrange(1000)), shard.path)
    require(isinstance(result, Refused), "a bad record was not noticed")
    require(f"record {bad}" in result.message, f"not record {bad}: {result.message}")
    return ERROR


def _all_bad(draw: Draw, folder: pathlib.Path) -> str:
    """Nothing good is left: no endless search."""
    path = folder / "pairs-train-00000.tfrecord"
    frames = [frame(example(_fields(n) | {"image": b"none"})) for n in range(99)]
    path.write_bytes(b"".join(frames))
    shard = Shard(path, 99, set(range(99)))
    result = attempt(lambda: read(shard, "skip", 0, batches=1), path)
    require(isinstance(result, Refused) and "in a row" in result.message, f"{result}")
    return ERROR


def _another_index(draw: Draw, folder: pathlib.Path) -> str:
    """An index of another shard makes good records unreadable; that is never skipped."""
    shard = make_shard(draw, folder, 0)
    frames = [_good_frame(n) for n in range(shard.count)]
    while True:
        other = draw.sample(frames, len(frames))
        own = list(map(len, frames))
        # Behind the first difference, the places agree again only where the sums do.
        if list(map(len, other)) != own:
            break
        frames[0] = frame(example(_fields(0) | {"caption": b"a longer text"}))
        shard.path.write_bytes(b"".join(frames))
    pathlib.Path(f"{shard.path}.idx").write_bytes(index(other))
    result = attempt(lambda: read(shard, "skip", 0), shard.path)
    require(isinstance(result, Refused), "records were skipped for a wrong index")
    return ERROR


def _undisturbed(draw: Draw, folder: pathlib.Path) -> str:
    shard = make_shard(draw, folder, 0)
    seed = draw.randrange(1000)
    values, passed_over = read(shard, "skip", seed)
    same, _ = read(shard, "error", seed)
    require(np.array_equal(values, same) and passed_over == 0, "a good shard")
    return SUCCESS


MUTATIONS = {
    "skip": _skip,
    "skip on two hosts": _skip_on_two_hosts,
    "good records keep their places": _good_records_keep_their_places,
    "error": _error,
    "all bad": _all_bad,
    "another shard's index": _another_index,
    "undisturbed": _undisturbed,
}
