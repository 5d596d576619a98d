"""The entries of a source, and their division among the processes of a job."""

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
# (left, top, right, bottom) in pixels.
Box = tuple[int, int, int, int]
# (number of the unit, index of the entry within it).
Order = tuple[int, int]
# A part of a source: a function that reads its entries.
Unit = Callable[[], Iterator[Entry]]

# Small enough that 64 hosts share 5,000 pictures.
_ITEMS_PER_UNIT = 64
_CHUNK = 2**26  # bytes that each process sends at once
_LONGEST_WORK_MS = 7 * 24 * 60 * 60 * 1000


@dataclasses.dataclass(frozen=True)
class CroppedPair(Pair):
    """A pair whose image is a box of a picture; the box is black outside of the picture."""

    box: Box = dataclasses.field(kw_only=True)


def decode_picture(pair: Pair) -> Image.Image:
    """Decodes the picture of a pair like `decode_rgb`, and crops it to its box, if any.

    Raises:
        ImageError: as in `decode_rgb`; also "too_large" for a box.
    """
    picture = decode_rgb(pair.image)
    if not isinstance(pair, CroppedPair):
        return picture
    left, top, right, bottom = pair.box
    if (right - left) * (bottom - top) > MAX_PIXELS:
        raise ImageError("too_large", f"box {pair.box}: at most {MAX_PIXELS} pixels are cut out")
    return picture.crop(pair.box)


class Units(list[Unit]):
    """The units of a source, with an estimate of the number of entries."""

    def __init__(self, units: Iterable[Unit], count: Callable[[], int | None]):
        """Wraps units; `count` may return an estimate, or None if unknown."""
        super().__init__(units)
        self.count_entries = count

    def entries(self) -> Generator[Entry]:
        """Yields the entries of all units, in order."""
        for unit in self:
            yield from unit()


def divide(items: Sequence[Any] | np.ndarray, read: Callable[..., Iterator[Entry]]) -> list[Unit]:
    """Divides items into units of `_ITEMS_PER_UNIT`, each read by `read`."""
    starts = range(0, len(items), _ITEMS_PER_UNIT)
    return [functools.partial(read, items[start : start + _ITEMS_PER_UNIT]) for start in starts]


def read_again(units: Sequence[Unit], orders: Iterable[Order]) -> dict[Order, Pair]:
    """Reads selected entries; opens only their units, each up to its last selected entry.

    Raises ValueError if an entry is no longer usable because the source has changed.
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
    """The processes of a job that embed a source together, each on its own devices."""

    index: int = 0  # of this process
    count: int = 1
    # Gathers a value from every process, in process order. A collective: all must call it.
    exchange: Callable[[Any], list[Any]] = lambda value: [value]

    @classmethod
    def of_job(cls) -> Processes:
        """Returns the processes of this job; a single one outside of a job."""
        if jax.process_count() == 1:
            return cls()
        return cls(jax.process_index(), jax.process_count(), _exchange)

    def together(self, work: Callable[[], Any]) -> Any:
        """Calls `work` in this process, waits for all processes, and returns its result.

        Raises:
            Exception: the error of this process.
            ValueError: another process failed; has its message.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as problem:  # otherwise the other processes would wait forever
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
    """Gathers a value from every process; values are pickled, which is safe within one job."""
    import orbax.checkpoint.multihost

    data = np.frombuffer(pickle.dumps(value), np.uint8)
    # Shares differ in size, and a collective fails if a process arrives much later than another.
    meet = orbax.checkpoint.multihost.get_barrier_sync_fn()
    meet(key="exchange", timeout_ms=_LONGEST_WORK_MS)
    gather = multihost_utils.process_allgather
    counts = np.asarray(gather(np.array(divmod(len(data), _CHUNK), np.int32)))
    sizes = counts[:, 0].astype(np.int64) * _CHUNK + counts[:, 1]
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(data)] = data
    # In chunks, since each chunk is replicated on every device.
    chunks = [padded[start : start + _CHUNK] for start in range(0, len(padded), _CHUNK)]
    rows = np.concatenate([np.asarray(gather(chunk)) for chunk in chunks], axis=1)
    return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
