"""The entries of a source, and how the processes of a job divide them and the rows of a batch."""

from __future__ import annotations

import dataclasses
import itertools
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

Entry = Pair | Skipped
# Number of an entry's unit, and the entry's own in it.
Order = tuple[int, int]
# Reads a part of a source.
Unit = Callable[[], Iterator[Entry]]

_FAILED = -1


class Entries(Iterable[Entry]):
    """All entries in order, or the share of one process with their order."""

    def __init__(
        self,
        units: Sequence[Unit],
        *,
        limit: int | None = None,
        count: Callable[[], object] = lambda: None,
    ):
        """Joins the parts of a source.

        Args:
            units: each reads the entries of one part.
            limit: number of entries that count, from the first on; None is all.
            count: called for each entry, for a progress bar.
        """
        self.limit, self._units, self._count = limit, units, count

    def __iter__(self) -> Iterator[Entry]:
        return (entry for _, entry in self.share(0, 1))

    def share(self, index: int, count: int) -> Iterator[tuple[Order, Entry]]:
        """The entries of every `count`-th unit from number `index` on.

        Where there is a limit, these are up to `limit` entries: which of them are among the first
        of all is known when all processes are through.
        """
        own = (
            ((number, offset), entry)
            for number in range(index, len(self._units), count)
            for offset, entry in enumerate(self._units[number]())
        )
        for order, entry in itertools.islice(own, self.limit):
            self._count()
            yield order, entry


def read_again(units: Sequence[Unit], orders: Iterable[Order]) -> dict[Order, Entry]:
    """Reads chosen entries; only the units that hold them are opened, up to the last of each.

    Args:
        units: as given to `Entries`.
        orders: of the entries.
    """
    wanted: dict[int, set[int]] = {}
    for unit, offset in orders:
        wanted.setdefault(unit, set()).add(offset)
    return {
        (unit, offset): entry
        for unit, own in wanted.items()
        for offset, entry in enumerate(itertools.islice(units[unit](), max(own) + 1))
        if offset in own
    }


@dataclasses.dataclass(frozen=True)
class ProcessRows:
    """The processes that embed together, and which rows of a batch each of them fills.

    All processes call the methods alike, in the same order.

    Attributes:
        index: of this process.
        rows: bool [processes, batch]; every process has some.
        gather: makes [processes, ...] of an array of each process, equal in shape.
    """

    index: int
    rows: np.ndarray
    gather: Callable[[np.ndarray], np.ndarray]

    @classmethod
    def of(cls, model: Any, batch_size: int) -> ProcessRows:
        """The processes that share a model; one, where this process has all of its rows."""
        find_rows = getattr(model, "own_rows", None)
        if find_rows is None or find_rows(batch_size) is None:
            return cls(0, np.ones((1, batch_size), bool), lambda array: array[None])
        return cls.create(
            jax.process_index(),
            batch_size,
            find_rows,
            lambda array: np.asarray(multihost_utils.process_allgather(array)),
        )

    @classmethod
    def create(
        cls,
        index: int,
        batch_size: int,
        find_rows: Callable[[int], np.ndarray],
        gather: Callable[[np.ndarray], np.ndarray],
    ) -> ProcessRows:
        """Like `of`, for an explicit layout of processes.

        Args:
            index, gather: see the class.
            batch_size: the least number of rows; doubled until every process has one.
            find_rows: this process's rows of a batch of a size, as `LoadedModel.own_rows`.
        """
        rows = np.asarray(gather(find_rows(batch_size)))
        while not rows.any(axis=1).all():
            rows = np.asarray(gather(find_rows(2 * rows.shape[1])))
        return cls(index, rows, gather)

    @property
    def count(self) -> int:
        """Number of processes."""
        return len(self.rows)

    @property
    def batch_size(self) -> int:
        """Rows of a batch, of all processes together."""
        return self.rows.shape[1]

    @property
    def own(self) -> np.ndarray:
        """int, the rows that this process fills."""
        return self.of_process(self.index)

    def of_process(self, process: int) -> np.ndarray:
        """int, the rows that a process fills."""
        return np.flatnonzero(self.rows[process])

    def share(self, entries: Iterable[Entry]) -> Iterator[tuple[Order, Entry]]:
        """The entries of this process with their order.

        Units of `Entries` are divided; any other iterable is read by all processes, and each keeps
        every n-th entry.
        """
        if isinstance(entries, Entries):
            return entries.share(self.index, self.count)
        numbered = enumerate(entries)
        return (((0, i), entry) for i, entry in numbered if i % self.count == self.index)

    def agree(self, filled: int, error: Exception | None) -> list[int]:
        """The number of rows that each process has filled this time.

        Raises:
            Exception: the error of this process.
            ValueError: one of another process, with its message.
        """
        if self.count == 1 and error is not None:
            raise error
        counts = self.gather(np.array([_FAILED if error else filled], np.int64))[:, 0].tolist()
        if _FAILED in counts:
            messages = self.gather_objects(None if error is None else f"{error}")
            if error is not None:
                raise error
            failed = counts.index(_FAILED)
            raise ValueError(f"process {failed} of {self.count}: {messages[failed]}")
        return counts

    def gather_objects(self, value: Any) -> list[Any]:
        """The value of every process; they travel pickled, between processes of one job."""
        if self.count == 1:
            return [value]
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = self.gather(np.array([len(data)], np.int64))[:, 0]
        padded = np.zeros(sizes.max(), np.uint8)
        padded[: len(data)] = data
        rows = self.gather(padded)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]
