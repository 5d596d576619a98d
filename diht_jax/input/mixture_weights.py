"""The source of each position of a run that mixes several sources, in exact shares.

A function of the position alone, in closed form, so that a run can begin anywhere. Positions are
those of `order.py`: position p is row p // V of stream p % V.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

# Longest cycle; shares with a larger common denominator are rounded to multiples of 1 / MAX_CYCLE.
MAX_CYCLE = 10_000


def exact_shares(weights: Sequence[Fraction]) -> list[Fraction]:
    """The shares of sources by their weights, with a common denominator up to `MAX_CYCLE`."""
    total = sum(weights)
    shares = [Fraction(weight) / total for weight in weights]
    if math.lcm(*(share.denominator for share in shares)) <= MAX_CYCLE:
        return shares
    # The largest remainders are rounded up; nothing that counts is rounded to nothing.
    counts = [max(int(share > 0), math.floor(share * MAX_CYCLE)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_CYCLE)
    for index in by_remainder[: max(0, MAX_CYCLE - sum(counts))]:
        counts[index] += 1
    return [Fraction(count, sum(counts)) for count in counts]


def make_cycle(shares: Sequence[Fraction]) -> np.ndarray:
    """The sources of D positions in a row, int64 [D], D the common denominator of their shares.

    The c-th entry of a source with share w is within the positions [c / w, (c + 1) / w): the
    earliest deadline goes first, and of equal ones that of the larger share (Liu and Layland,
    Journal of the ACM 1973; Baruah et al., Algorithmica 1996).
    """
    length = math.lcm(*(share.denominator for share in shares))
    released: list[list[tuple[int, Fraction, int]]] = [[] for _ in range(length)]
    for source, share in enumerate(shares):
        for count in range(int(share * length)):
            deadline = math.ceil((count + 1) / share)
            released[math.floor(count / share)].append((deadline, -share, source))
    waiting: list[tuple[int, Fraction, int]] = []
    cycle = np.zeros(length, np.int64)
    for position, entries in enumerate(released):
        for entry in entries:
            heapq.heappush(waiting, entry)
        cycle[position] = heapq.heappop(waiting)[2]
    return cycle


class _Rotation:
    """A cycle as the V streams of a run go through it.

    Position p has entry (p + (p // V) a) mod D of the cycle, with the smallest a for which V + a
    and D have no common factor. So within V positions the entries follow each other, and each
    stream goes through all entries in D rows: `turned` has them in the order of a stream.
    """

    def __init__(self, shares: Sequence[Fraction], num_streams: int):
        cycle = make_cycle(shares)
        length = len(cycle)
        step = next(n for n in range(num_streams, sys.maxsize) if math.gcd(n, length) == 1)
        self.length = length
        self.turned = cycle[np.arange(length) * (step % length) % length]
        # Where a stream begins in `turned`.
        inverse = pow(step, -1, length) if length > 1 else 0
        self.begins = np.arange(num_streams) * inverse % length
        is_source = self.turned == np.arange(len(shares))[:, None]
        self.before = np.cumsum(np.pad(is_source, ((0, 0), (1, 0))), axis=1)  # [sources, D + 1]
        self.per_cycle = self.before[:, -1]

    def count(self, source: int, entries: int | np.ndarray) -> int | np.ndarray:
        """Counts the entries of a source among the first ones of the endless `turned`."""
        cycles, rest = np.divmod(entries, self.length)
        return cycles * self.per_cycle[source] + self.before[source, rest]


@dataclasses.dataclass(frozen=True)
class _Segment:
    """Shares of a part of the run."""

    first_row: int  # of each stream
    rotation: _Rotation  # of the shares
    taken: np.ndarray  # int64 [sources, V], rows that each stream has taken from each source before


class MixtureWeights:
    """The source of each position, and that source's own position for it.

    Own positions are numbered like those of a run: row i of stream s is own position i V + s, where
    i counts the rows of the stream that came from the source. So every own position is used once,
    and a stream stays on its host.
    """

    def __init__(
        self, points: Sequence[tuple[int, Sequence[Fraction]]], *, num_streams: int, batch_size: int
    ):
        """Makes the tables of V streams and batches of a multiple of V.

        Args:
            points: step from which on they hold (the first is 0), and the weights of the sources.
            num_streams: V.
            batch_size: global.
        """
        self.num_streams = num_streams
        self._points = [(step, exact_shares(weights)) for step, weights in points]
        self._segments: list[_Segment] = []
        taken = np.zeros((len(points[0][1]), num_streams), np.int64)
        for step, shares in self._points:
            first_row = step * batch_size // num_streams
            if self._segments:
                taken = self._taken(self._segments[-1], first_row)
            rotation = _Rotation(shares, num_streams)
            self._segments.append(_Segment(first_row, rotation, taken))
        self._first_rows = [segment.first_row for segment in self._segments]
        # Batches after which each stream is at the same entry of every cycle again.
        self.period = math.lcm(*(segment.rotation.length for segment in self._segments))

    def describe(self) -> list[str]:
        """The shares of each source, such as "4/5" or "4/5, from step 1000 on 1/2"."""
        return [
            ", ".join(
                f"from step {step} on {shares[source]}" if step else str(shares[source])
                for step, shares in self._points
            )
            for source in range(len(self._points[0][1]))
        ]

    def find(self, position: int) -> tuple[int, int]:
        """The source of a position, and its own position for it."""
        row, stream = divmod(position, self.num_streams)
        segment = self._segments[bisect.bisect_right(self._first_rows, row) - 1]
        rotation = segment.rotation
        begin = int(rotation.begins[stream])
        end = begin + row - segment.first_row
        source = int(rotation.turned[end % rotation.length])
        count = rotation.count(source, end) - rotation.count(source, begin)
        return source, int(count + segment.taken[source, stream]) * self.num_streams + stream

    def counts(self, position: int) -> list[int]:
        """Examples that each source has given before a position, a multiple of V."""
        row = position // self.num_streams
        segment = self._segments[bisect.bisect_right(self._first_rows, row) - 1]
        return self._taken(segment, row).sum(axis=1).tolist()

    def _taken(self, segment: _Segment, row: int) -> np.ndarray:
        rotation = segment.rotation
        ends = rotation.begins + row - segment.first_row
        counts = [
            rotation.count(source, ends) - rotation.count(source, rotation.begins)
            for source in range(len(segment.taken))
        ]
        return segment.taken + np.array(counts)
