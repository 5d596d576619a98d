"""The entries of a source, and how the processes of a job divide them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from PIL import Image

from diht_jax.input.transforms import MAX_PIXELS, ImageError, decode_rgb
from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

Entry = Pair | Skipped
# Left, top, right and bottom, in pixels.
Box = tuple[int, int, int, int]
# Number of an entry's unit, and the entry's own in it.
Order = tuple[int, int]
# Reads a part of a source.
Unit = Callable[[], Iterator[Entry]]

# Small enough that 64 hosts share 5,000 pictures.
_ITEMS_PER_UNIT = 64
_CHUNK = 2**26  # bytes of each process that travel at once
_LONGEST_WORK_MS = 7 * 24 * 60 * 60 * 1000


@dataclasses.dataclass(frozen=True)
class CroppedPair(Pair):
    """A pair on a part of a picture; what of its box is outside of the picture is black."""

    box: Box = dataclasses.field(kw_only=True)


def decode_picture(pair: Pair) -> Image.Image:
    """The picture of a pair as `decode_rgb` gives it, cut to its box where it has one.

    Raises:
        ImageError: as `decode_rgb`; "too_large" for a box, too.
    """
    picture = decode_rgb(pair.image)
    if not isinstance(pair, CroppedPair):
        return picture
    left, top, right, bottom = pair.box
    if (right - left) * (bottom - top) > MAX_PIXELS:
        raise ImageError("too_large", f"box {pair.box}: at most {MAX_PIXELS} pixels are cut out")
    return picture.crop(pair.box)


class Units(list[Unit]):
    """The parts of a source, and about how many entries they have."""

    def __init__(self, units: Iterable[Unit], count: Callable[[], int | None]):
        """Joins them; the number of entries may be an estimate, and None where it is unknown."""
        super().__init__(units)
        self.count_entries = count

    def entries(self) -> Generator[Entry]:
        """The entries of all parts, in order."""
        for unit in self:
            yield from unit()


def divide(items: Sequence[Any] | np.ndarray, read: Callable[..., Iterator[Entry]]) -> list[Unit]:
    """Divides items into units of some, each of which `read` takes."""
    starts = range(0, len(items), _ITEMS_PER_UNIT)
    return [functools.partial(read, items[start : start + _ITEMS_PER_UNIT]) for start in starts]


def read_again(units: Sequence[Unit], orders: Iterable[Order]) -> dict[Order, Pair]:
    """Reads chosen entries; only the units that hold them are opened, up to the last of each.

    Where the source has changed, so that one cannot be used any more, there is a ValueError.
    """
    wanted: dict[int, set[Order]] = {}
    for order in orders:
        wanted.setdefault(order[0], set()).add(order)
    found: dict[Order, Pair] = {}
    for unit, own in wanted.items():
        entries = units[unit]() if unit < len(units) else iter(())
        for offset, entry in enumerate(itertools.islice(entries, max(own)[1] + 1)):
            if (unit, offset) not in own:
                continue
            if isinstance(entry, Skipped):
                raise ValueError(f"'{entry.key}' cannot be read again: {entry.reason}")
            found[unit, offset] = entry
        if gone := own - found.keys():
            raise ValueError(
                f"the source has changed since it was read: part {unit} has no entry {min(gone)[1]}"
            )
    return found


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a job that embed together, each its share on devices of its own."""

    index: int = 0  # of this process
    count: int = 1
    # Gives the value of every process, in their order; all call it alike.
    exchange: Callable[[Any], list[Any]] = lambda value: [value]

    @classmethod
    def of_job(cls) -> Processes:
        """The processes of the job; this one where it is alone."""
        if jax.process_count() == 1:
            return cls()
        return cls(jax.process_index(), jax.process_count(), _exchange)

    def together(self, work: Callable[[], Any]) -> Any:
        """Result of a function in this process, once all are through.

        Raises:
            Exception: the error of this process.
            ValueError: one of another process, with its message.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as problem:  # the others would wait for this process without end
            error = problem
            logging.error("%s (the job ends when the other processes are through)", problem)
        messages = self.exchange(None if error is None else f"{error}")
        if error is not None:
            raise error
        for process, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"process {process} of {self.count}: {message}")
        return result


def _exchange(value: Any) -> list[Any]:
    """The value of every process; they travel pickled, between processes of one job."""
    import orbax.checkpoint.multihost

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    # Shares differ in size, and a collective fails where a process comes much later than another.
    meet = orbax.checkpoint.multihost.get_barrier_sync_fn()
    meet(key="exchange", timeout_ms=_LONGEST_WORK_MS)
    gather = multihost_utils.process_allgather
    counts = np.asarray(gather(np.array(divmod(len(data), _CHUNK), np.int32)))
    sizes = counts[:, 0].astype(np.int64) * _CHUNK + counts[:, 1]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    # In chunks, since each of them is on every device.
    chunks = [padded[start : start + _CHUNK] for start in range(0, len(padded), _CHUNK)]
    rows = np.concatenate([np.asarray(gather(chunk)) for chunk in chunks], axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
