"""The entries of a source, which the processes of a job share: each reads only its own parts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from diht_jax.readers.base import Skipped
from diht_jax.records.schema import Pair

Entry = Pair | Skipped
# Of an entry: the number of its unit, and its own in it.
Order = tuple[int, int]


class Entries(Iterable[Entry]):
    """All entries in order, or the share of one process with their order.

    Attributes:
        limit: only the first so many entries count; None is all.
    """

    def __init__(
        self,
        units: Sequence[Callable[[], Iterator[Entry]]],
        *,
        limit: int | None = None,
        count: Callable[[], object] = lambda: None,
    ):
        """Of the parts of a source.

        Args:
            units: each reads the entries of one part.
            limit: only the first so many entries count; None is all.
            count: called for each entry, for a progress bar.
        """
        self.limit = limit
        self._units = units
        self._count = count

    def __iter__(self) -> Iterator[Entry]:
        entries = itertools.chain.from_iterable(unit() for unit in self._units)
        for entry in itertools.islice(entries, self.limit):
            self._count()
            yield entry

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


def read_again(
    units: Sequence[Callable[[], Iterator[Entry]]], orders: Mapping[int, Order]
) -> dict[int, Entry]:
    """Chosen entries, of which only the units that hold them are read, up to the last of each.

    Args:
        units: as of `Entries`.
        orders: of each entry, by whatever number.
    """
    wanted: dict[int, dict[int, int]] = {}
    for number, (unit, offset) in orders.items():
        wanted.setdefault(unit, {})[offset] = number
    return {
        own[offset]: entry
        for unit, own in wanted.items()
        for offset, entry in enumerate(itertools.islice(units[unit](), max(own) + 1))
        if offset in own
    }


def share_entries(
    entries: Iterable[Entry], index: int, count: int
) -> Iterator[tuple[Order, Entry]]:
    """The share of one process; what cannot be divided is read by all, and every n-th entry kept.

    Args:
        entries: `Entries`, or any others, which all processes iterate over alike.
        index: of the process.
        count: of processes.
    """
    if isinstance(entries, Entries):
        return entries.share(index, count)
    numbered = enumerate(entries)
    return (((0, number), entry) for number, entry in numbered if number % count == index)
