"""The training input on shards with some bad records, with `on_bad_record` "error" and "skip"."""

from __future__ import annotations

import functools
import io
import pathlib
from typing import Any

import numpy as np
from absl import logging
from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one
from PIL import Image

from diht_jax.input.examples import DecodeExample
from diht_jax.input.pipeline import TrainIterator, open_records
from tests.fuzz.damage import Draw, flipped, noise
from tests.fuzz.framing import example, frame, index
from tests.fuzz.judge import ERROR, SKIP, SUCCESS, Refused, attempt, require

_SIDE = 4
# One epoch at least. (Of a dozen records grain takes milliseconds for each index of the order.)
_BATCH_SIZE, _BATCHES = 16, 4
_DECODE = DecodeExample(_SIDE, 8, (0.9, 1.0), "{caption}", num_concepts=3)
_NAMES = {"images", "tokens", "object_ids", "object_probs", "attribute_ids", "attribute_probs"}


def prepare(base: pathlib.Path) -> None:
    """Every bad record is logged; there are many."""
    logging.set_verbosity(logging.ERROR)


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
    changes = [{"image": data} for data in (b"", b"no picture", image[:20], b"\xff\xd8\xff")]
    changes += [{name: None} for name in fields]
    changes += [{"metadata": data} for data in (b"{", b"[]", b"[" * 100_000)]
    changes += [{"object_ids": [1, 2], "object_probs": [0.5]}]
    changes += [{"object_ids": [1], "object_probs": [float("nan")]}]
    changes += [{"image": fields["caption"], "caption": image}]
    kind = draw(integers(0, 4))
    if kind == 0:
        return frame(draw(noise(40, 40)))
    if kind == 1:
        good = _good_frame(number)
        at = draw(st.sampled_from([0, 12]))
        return good[:at] + draw(flipped(good[at : at + 12], 1)) + good[at + 12 :]
    fields |= draw(one(changes))
    return frame(example({name: value for name, value in fields.items() if value is not None}))


class _Shard:
    """Some sixty records whose picture number i has the grey value i, some of them bad.

    Attributes:
        path: of the file; it has an index.
        count: of all records.
        bad: numbers of those that cannot be used; no two lie side by side.
        good: numbers of the others.
        seed: of the order in which it is read.
    """

    def __init__(self, draw: Draw, folder: pathlib.Path, num_bad: int):
        self.count = draw(integers(_BATCHES * _BATCH_SIZE - 12, _BATCHES * _BATCH_SIZE))
        numbers = range(draw(integers(0, 2)), self.count, 2)
        self.bad = draw(st.sets(one(numbers), min_size=num_bad, max_size=num_bad))
        self.good = set(range(self.count)) - self.bad
        frames = [
            _bad_frame(draw, n) if n in self.bad else _good_frame(n) for n in range(self.count)
        ]
        self.path = _write(folder, frames)
        self.seed = draw(integers(0, 999))

    def read(self, mode: str = "skip", **options: Any) -> tuple[np.ndarray, int]:
        """As the function `_read`."""
        return _read(self.path, mode, self.seed, **options)


def _write(folder: pathlib.Path, frames: list[bytes]) -> pathlib.Path:
    path = folder / "pairs-train-00000.tfrecord"
    path.write_bytes(b"".join(frames))
    pathlib.Path(f"{path}.idx").write_bytes(index(frames))
    return path


def _read(path: pathlib.Path, mode: str, seed: int, batches: int = _BATCHES, **options: Any):
    """Grey values of the first batches, [batches, b], and how many records were skipped."""
    options |= {"batch_size": _BATCH_SIZE, "seed": seed, "num_workers": 0, "on_bad_record": mode}
    iterator = TrainIterator(open_records(str(path)), _DECODE, **options)
    try:
        found = [next(iterator) for _ in range(batches)]
        keys = [iterator.keys(number * _BATCH_SIZE) for number in range(batches)]
    finally:
        iterator.close()
    for batch in found:
        require(batch.keys() == _NAMES, f"a batch of {sorted(batch)}")
        require(bool(np.isfinite(batch["object_probs"]).all()), "labels that are not finite")
    values = np.array([batch["images"][:, 0, 0, 0] for batch in found])
    expected = [[f"key{value}" for value in row] for row in values]
    require(keys == expected, f"keys {keys}, but records {values}")
    return values, iterator.skipped_records


def check_skip(draw: Draw, folder: pathlib.Path) -> str:
    """Every good record of the epoch comes; in a bad one's stead comes a good one."""
    shard = _Shard(draw, folder, draw(integers(1, 20)))
    values, skipped = shard.read()
    require(values.shape == (_BATCHES, _BATCH_SIZE), f"batches of {values.shape}")
    seen = set(values.flatten().tolist())
    require(seen == shard.good, f"lost {shard.good - seen}, bad {seen - shard.good}")
    require(skipped >= len(shard.bad), f"{skipped} counted of {len(shard.bad)}")
    again, counted = shard.read()
    require(np.array_equal(values, again) and counted == skipped, "another order the next time")
    parts = [shard.read(process_index=i, process_count=2) for i in range(2)]
    together = np.stack([part for part, _ in parts], axis=2).reshape(values.shape)
    require(np.array_equal(values, together), f"one host {values}, two hosts {together}")
    require(skipped == sum(count for _, count in parts), "two hosts count differently")
    return SKIP


def check_good_records_keep_their_positions(draw: Draw, folder: pathlib.Path) -> str:
    """The order is that of the undamaged shard but for the bad records' positions."""
    shard = _Shard(draw, folder, draw(integers(0, 20)))
    (folder / "whole").mkdir()
    path = _write(folder / "whole", [_good_frame(n) for n in range(shard.count)])
    values, skipped = shard.read()
    whole, num_skipped = _read(path, draw(one(["skip", "error"])), shard.seed)
    require(num_skipped == 0, "good records were skipped")
    was_bad = np.isin(whole, list(shard.bad))
    require(np.array_equal(values[~was_bad], whole[~was_bad]), "good records have moved")
    require(skipped >= was_bad.sum(), f"{skipped} counted of {was_bad.sum()}")
    return SKIP if shard.bad else SUCCESS


def check_error(draw: Draw, folder: pathlib.Path) -> str:
    """By default the first bad record ends the run, with an error that says which it is."""
    shard = _Shard(draw, folder, 1)
    (bad,) = shard.bad
    result = attempt(lambda: shard.read("error"), shard.path)
    require(isinstance(result, Refused), "a bad record was not noticed")
    require(f"record {bad}" in result.message, f"not record {bad}: {result.message}")
    return ERROR
