"""Mixing of one or several sources in exact shares: maps a position to (source, record).

The source of a position has a closed form that depends only on the position, so a run can start
anywhere. Positions are those of `order.py`: position p is row p // V of stream p % V.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import heapq
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction

import ml_collections
import numpy as np

from diht_jax.input.blocks import BlockStore, read_patiently
from diht_jax.input.choices import check_crops
from diht_jax.input.examples import DecodeExample
from diht_jax.input.order import BlockOrder, GlobalOrder, count_streams, make_order
from diht_jax.records.labels.clip_embeddings import ClipEmbeddings
from diht_jax.records.labels.shards import LabelRecords, open_labels
from diht_jax.records.schema import Record
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.train_data import (
    NO_RECORDS,
    Fingerprint,
    TrainSource,
    fingerprint_records,
    held_out_records,
    join_weights,
    open_records,
    parse_train,
    resolve_source,
)

# Upper bound of the number of batches between a bad record and its replacement.
_LONGEST_CYCLE = 10**6

# Longest cycle; shares with a larger common denominator are rounded to multiples of 1 / MAX_CYCLE.
MAX_CYCLE = 10_000


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of training records, with its order, decoder and labels."""

    name: str  # its key in `config.data.train`; "" for a single source
    records: ShardedRecords  # record number -> element
    order: GlobalOrder | BlockOrder  # position within the source -> record number
    decode: DecodeExample  # makes an example of a record
    # Concept labels of the records and embeddings of CLIP teachers, if any.
    labels: tuple[LabelRecords, ...] = ()
    # Read-ahead of the records, if they are in an object store.
    blocks: BlockStore | None = None


@dataclasses.dataclass(eq=False)
class Mixture:
    """The records of an endless run by position, from one or several sources.

    Attributes:
        num_records: of all sources without held-out records; the length of an epoch.
        example_bytes: size of one decoded example.
        same_source_batches: period, in batches, after which a row comes from the same source again,
            unless weights change.
    """

    sources: Sequence[Source]  # at least one
    weights: MixtureWeights | None = None  # of several sources; None for a single one

    def __post_init__(self):
        self.num_records = sum(source.order.num_records for source in self.sources)
        self.example_bytes = max(source.decode.example_bytes for source in self.sources)
        period = self.weights.period if self.weights else 1
        self.same_source_batches = period if period < _LONGEST_CYCLE else 1

    def read(self, position: int, *, fetch: bool = False) -> tuple[Source, Record]:
        """Returns the source of a position, and its record with labels.

        If the record's block is not local, it is fetched (with `fetch`) or only the record is read.
        Errors name the record, or the file of labels.
        """
        number, index = self.find(position)
        source = self.sources[number]
        element = None if source.blocks is None else source.blocks.read(index, fetch=fetch)
        element = source.records[index] if element is None else element
        record = source.records.decode(element)
        for labels in source.labels:
            record = labels.join(record, index)
        return source, record

    def find(self, position: int) -> tuple[int, int]:
        """Returns the source number and the record number of a position."""
        number, own = self._find_source(position)
        return number, self.sources[number].order[own]

    def count_trained(self, data: ml_collections.ConfigDict, seed: int) -> int:
        """Counts the records of an epoch with another `validation_share` or seed."""
        found = self.num_record_ids
        for source in self.sources if data.validation_share else ():
            found -= len(held_out_records(source.records, data, seed))
        return found

    @property
    def num_record_ids(self) -> int:
        """Exclusive bound of `record_id`: the records of all sources, including held-out ones."""
        return sum(len(source.records) for source in self.sources)

    def record_id(self, position: int) -> int:
        """Returns an id of the record at a position that is unique among all sources."""
        number, record = self.find(position)
        return sum(len(source.records) for source in self.sources[:number]) + record

    def locate(self, position: int) -> tuple[str, int]:
        """Returns the file of the record at a position, and its number within the file."""
        number, record = self.find(position)
        return self.sources[number].records.locate(record)

    def metrics(self, position: int) -> dict[str, float]:
        """Returns the examples and epochs of each source up to a position; empty for one source."""
        if not self.weights:
            return {}
        found = {}
        for source, count in zip(self.sources, self.weights.counts(position), strict=True):
            found[f"sources/{source.name}/examples"] = float(count)
            found[f"sources/{source.name}/epochs"] = count / source.order.num_records
        return found

    def fingerprint(self) -> Fingerprint:
        """Identifies all shards and labels; with several sources, names start with the source's."""
        rows = []
        for source in self.sources:
            shards = list(fingerprint_records(source.records).shards)
            for labels in source.labels:
                shards += labels.fingerprint()
            for name, count, size, digest in shards:
                own = f"{source.name}/{name}" if self.weights else name
                rows.append((own, count, size, digest))
        return Fingerprint(tuple(rows))

    def describe_orders(self) -> list[str]:
        """Describes the order and the shares of each source, for the log."""
        if not self.weights:
            return [self.sources[0].order.describe()]
        shares = self.weights.describe()
        return [
            f"{source.name} ({share} of the examples): {source.order.describe()}"
            for source, share in zip(self.sources, shares, strict=True)
        ]

    def request(self, positions: Iterable[int]) -> None:
        """Starts to fetch the blocks of the records at some positions, from object stores."""
        wanted: dict[tuple[BlockStore, int], None] = {}  # in the order of the positions
        for position in positions:
            number, own = self._find_source(position)
            blocks = self.sources[number].blocks
            if blocks:
                wanted[blocks, blocks.order.block_at(own)] = None
        for blocks, block in wanted:
            blocks.request(block)

    def keep(self, first: int, end: int, streams: slice) -> None:
        """Deletes blocks that `streams` do not read between two positions, multiples of V."""
        for number, source in enumerate(self.sources):
            blocks = source.blocks
            if blocks is None or blocks.stays:
                continue
            if self.weights:
                begins, ends = (self.weights.next_positions(p)[number] for p in (first, end))
            else:
                begins, ends = (p + np.arange(blocks.order.num_streams) for p in (first, end))
            blocks.keep(blocks.order.blocks_between(begins[streams], ends[streams]))

    def _find_source(self, position: int) -> tuple[int, int]:
        """Returns the source number of a position, and the position within that source."""
        return self.weights.find(position) if self.weights else (0, position)


def open_mixture(
    data: ml_collections.ConfigDict,
    seed: int,
    make_decoder: Callable[[str], DecodeExample],
    process_count: int = 1,
) -> Mixture:
    """Opens the sources of `config.data.train` with their orders and shares.

    The seed of each source's order is derived from `seed` and its name. `make_decoder` takes the
    text template of a source; `process_count` hosts read the records together.

    Raises:
        ValueError: the section is wrong, a source has no records, or labels are missing or belong
            to other records; names the key.
    """
    sources = []
    parsed = list(map(resolve_source, parse_train(data.train, data.get("labels"))))
    for source in parsed:
        path_key = f"config.data.train.{source.name}.path" if source.name else "config.data.train"
        records = open_records(source.path, path_key)
        if not len(records):
            raise ValueError(f"{path_key}: {records!r} holds no record")
        order = make_order(
            records,
            source.order or data.order,
            data,
            _source_seed(seed, source),
            process_count,
            held_out_records(records, data, seed) if data.get("validation_share") else NO_RECORDS,
        )
        if isinstance(order, GlobalOrder):
            records.make_offsets_local(data.cache_dir)
        decode = make_decoder(source.text_template or data.text_template)
        labels: list[LabelRecords] = []
        key = f"config.data.train.{source.name}.labels" if source.name else "config.data.labels"
        patiently = functools.partial(read_patiently, timeout_secs=data.read_timeout_secs)
        options = {"cache_dir": data.cache_dir, "patiently": patiently}
        if source.labels and decode.num_concepts:
            labels.append(open_labels(source.labels, records, key, **options))
        if source.labels and decode.teacher_width:
            clips = ClipEmbeddings.open(source.labels, records, key, **options)
            check_crops(clips, f"{key}={source.labels}")
            labels += [] if clips is None else [clips]
        sources.append(Source(source.name, records, order, decode, tuple(labels)))
    if not parsed[0].name:
        return Mixture(sources)
    in_blocks = any(isinstance(source.order, BlockOrder) for source in sources)
    points = join_weights([source.weights for source in parsed])
    streams = count_streams(data, process_count) if in_blocks else 1
    return Mixture(sources, MixtureWeights(points, num_streams=streams, batch_size=data.batch_size))


def _source_seed(seed: int, source: TrainSource) -> int:
    """Derives a seed from the source's name, so that sources with equal data differ in order."""
    if not source.name:
        return seed
    words = [seed, *source.name.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])


def exact_shares(weights: Sequence[Fraction]) -> list[Fraction]:
    """Normalises weights to shares with a common denominator up to `MAX_CYCLE`."""
    total = sum(weights)
    shares = [Fraction(weight) / total for weight in weights]
    if math.lcm(*(share.denominator for share in shares)) <= MAX_CYCLE:
        return shares
    # The largest remainders are rounded up; no positive share is rounded to 0.
    counts = [max(int(share > 0), math.floor(share * MAX_CYCLE)) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - shares[i] * MAX_CYCLE)
    for index in by_remainder[: max(0, MAX_CYCLE - sum(counts))]:
        counts[index] += 1
    return [Fraction(count, sum(counts)) for count in counts]


def make_cycle(shares: Sequence[Fraction]) -> np.ndarray:
    """Returns a cycle of sources, int64 [D], where D is the common denominator of their shares.

    The c-th entry of a source with share w is within the positions [c / w, (c + 1) / w). The
    schedule is earliest deadline first, with ties broken by the larger share (Liu and Layland,
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
    """The traversal of a cycle by the V streams of a run.

    Position p has entry (p + (p // V) a) mod D of the cycle, with the smallest a for which V + a
    and D are coprime. The V positions of a row therefore have consecutive entries, and each stream
    visits all entries in D rows. `turned` has the entries in the order of a stream.
    """

    def __init__(self, shares: Sequence[Fraction], num_streams: int):
        cycle = make_cycle(shares)
        length = len(cycle)
        step = next(n for n in range(num_streams, sys.maxsize) if math.gcd(n, length) == 1)
        self.length = length
        self.turned = cycle[np.arange(length) * (step % length) % length]
        # The start of each stream in `turned`.
        inverse = pow(step, -1, length) if length > 1 else 0
        self.begins = np.arange(num_streams) * inverse % length
        is_source = self.turned == np.arange(len(shares))[:, None]
        self.before = np.cumsum(np.pad(is_source, ((0, 0), (1, 0))), axis=1)  # [sources, D + 1]
        self.per_cycle = self.before[:, -1]

    def count(self, source: int, entries: int | np.ndarray) -> int | np.ndarray:
        """Counts the entries of a source among the first `entries` of the repeated `turned`."""
        cycles, rest = np.divmod(entries, self.length)
        return cycles * self.per_cycle[source] + self.before[source, rest]


@dataclasses.dataclass(frozen=True)
class _Segment:
    """A part of the run with constant shares."""

    first_row: int  # of each stream
    rotation: _Rotation  # of the shares
    taken: np.ndarray  # int64 [sources, V], previous rows of each stream from each source


class MixtureWeights:
    """Maps a position of the run to a source and a position within this source.

    The i-th row of stream s that comes from a source has position i V + s within the source. Every
    position of a source is therefore used once, and a stream stays on its host.
    """

    def __init__(
        self, points: Sequence[tuple[int, Sequence[Fraction]]], *, num_streams: int, batch_size: int
    ):
        """Creates the tables for V = `num_streams`, which must divide the global batch.

        `points` are pairs of a first step (0 for the first pair) and the sources' weights.
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
        # Number of batches after which each stream repeats its entries of every cycle.
        self.period = math.lcm(*(segment.rotation.length for segment in self._segments))

    def describe(self) -> list[str]:
        """Describes the shares of each source, such as "4/5" or "4/5, from step 1000 on 1/2"."""
        return [
            ", ".join(
                f"from step {step} on {shares[source]}" if step else str(shares[source])
                for step, shares in self._points
            )
            for source in range(len(self._points[0][1]))
        ]

    def find(self, position: int) -> tuple[int, int]:
        """Returns the source of a position, and the position within this source."""
        row, stream = divmod(position, self.num_streams)
        segment = self._segments[bisect.bisect_right(self._first_rows, row) - 1]
        rotation = segment.rotation
        begin = int(rotation.begins[stream])
        end = begin + row - segment.first_row
        source = int(rotation.turned[end % rotation.length])
        count = rotation.count(source, end) - rotation.count(source, begin)
        return source, int(count + segment.taken[source, stream]) * self.num_streams + stream

    def counts(self, position: int) -> list[int]:
        """Counts the examples of each source before a position, a multiple of V."""
        return (self.next_positions(position) // self.num_streams).sum(axis=1).tolist()

    def next_positions(self, position: int) -> np.ndarray:
        """Returns the streams' next positions within sources from a multiple of V, [sources, V]."""
        row = position // self.num_streams
        segment = self._segments[bisect.bisect_right(self._first_rows, row) - 1]
        return self._taken(segment, row) * self.num_streams + np.arange(self.num_streams)

    def _taken(self, segment: _Segment, row: int) -> np.ndarray:
        rotation = segment.rotation
        ends = rotation.begins + row - segment.first_row
        counts = [
            rotation.count(source, ends) - rotation.count(source, rotation.begins)
            for source in range(len(segment.taken))
        ]
        return segment.taken + np.array(counts)
