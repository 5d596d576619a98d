"""What stands at each position of a run: a record of one source, or of several in given shares."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from diht_jax.input.block_order import BlockOrder, merge_needs
from diht_jax.input.examples import DecodeExample
from diht_jax.input.fixed_crops import check_crops
from diht_jax.input.order import GlobalOrder, count_streams, make_order
from diht_jax.input.read_ahead.fetching import try_patiently
from diht_jax.input.shares import Shares
from diht_jax.records.catalog import Share
from diht_jax.records.fingerprint import Fingerprint, fingerprint_records
from diht_jax.records.labels.clip_embeddings import ClipRows, open_clip_embeddings
from diht_jax.records.labels.rows import LabelRows, open_labels, resolve_source
from diht_jax.records.train_data import TrainSource, parse_train, switching_steps, weight_at

# Batches between a bad record and what replaces it are no more than this.
_LONGEST_CYCLE = 10**6


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of a run.

    Attributes:
        name: its key in `config.data.train`; "" of the only one.
        records: number of the record -> its element.
        order: own position -> number of the record.
        decode: makes an example of an element of these records.
        labels: of these records; an element is then one of theirs together with its row of labels.
        clips: of these records; an element is then one of the above together with its row.
    """

    name: str
    records: Sequence[Any]
    order: GlobalOrder | BlockOrder
    decode: DecodeExample
    labels: LabelRows | None = None
    clips: ClipRows | None = None

    @property
    def sidecars(self) -> tuple[LabelRows, ...]:
        """What lies beside the records, in the order in which it is joined."""
        return tuple(rows for rows in (self.labels, self.clips) if rows is not None)

    def element(self, record: int) -> Any:
        """What `decode` takes of a record."""
        element = self.records[record]
        for rows in self.sidecars:
            element = element, rows[record]
        return element


class Mixture(Sequence[tuple[int, Any]]):
    """The records of an endless run, position by position.

    Attributes:
        sources: at least one.
    """

    def __init__(self, sources: Sequence[Source], shares: Shares | None = None):
        """Reads nothing yet.

        Args:
            sources: at least one.
            shares: of several sources; None with the only one.
        """
        self.sources = tuple(sources)
        self._shares = shares

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, position: int) -> tuple[int, Any]:
        """The number of the source at a position, and the element of its record."""
        number, record = self._find(position)
        return number, self.sources[number].element(record)

    def record_number(self, position: int) -> int | tuple[int, int]:
        """The number of the record at a position; of several sources, behind the source's own."""
        number, record = self._find(position)
        return (number, record) if self._shares else record

    def key(self, position: int) -> str:
        """The key of the record at a position."""
        number, element = self[position]
        return self.sources[number].decode.decode_record(element).key

    def path(self, position: int) -> str:
        """The file of the record at a position, as far as its source knows it, else ""."""
        return self._locate(position)[0]

    def describe(self, position: int) -> str:
        """File and number within it of the record, as far as its source knows them, else ""."""
        path, record = self._locate(position)
        return f"{path}: record {record}" if path else ""

    @property
    def num_records(self) -> int:
        """Of all sources together: an epoch of the run."""
        return sum(len(source.records) for source in self.sources)

    @property
    def num_streams(self) -> int:
        """V; 1 where no source is read in blocks."""
        if self._shares:
            return self._shares.num_streams
        return getattr(self.sources[0].order, "num_streams", 1)

    @property
    def example_bytes(self) -> int:
        """Size of one decoded example."""
        return max(source.decode.example_bytes for source in self.sources)

    @property
    def same_source_batches(self) -> int:
        """So many batches further, a row comes from the same source, unless weights change."""
        return self._shares.period if self._shares and self._shares.period < _LONGEST_CYCLE else 1

    def metrics(self, position: int) -> dict[str, float]:
        """Examples and epochs of each source before a position; nothing with the only one."""
        if not self._shares:
            return {}
        found = {}
        for source, count in zip(self.sources, self._shares.counts(position), strict=True):
            found[f"sources/{source.name}/examples"] = float(count)
            found[f"sources/{source.name}/epochs"] = count / len(source.records)
        return found

    def fingerprint(self) -> Fingerprint:
        """Of all shards and labels; with several sources their names stand before those."""
        rows = []
        for source in self.sources:
            beside = [row for rows in source.sidecars for row in rows.fingerprint()]
            for name, *rest in (*fingerprint_records(source.records).shards, *beside):
                rows.append((f"{source.name}/{name}" if self._shares else name, *rest))
        return Fingerprint(tuple(rows))

    def describe_orders(self, batch_size: int) -> list[str]:
        """The order of each source, and its shares of the run, for the log."""
        if not self._shares:
            return [self.sources[0].order.describe(batch_size)]
        shares = self._shares.describe()
        return [
            f"{source.name} ({share} of the examples): {source.order.describe(batch_size)}"
            for source, share in zip(self.sources, shares, strict=True)
        ]

    def plan(self, number: int) -> BlockOrder | SourcePlan:
        """Which blocks of a source the run needs when, for a source that is read in blocks."""
        order = self.sources[number].order
        return SourcePlan(order, self._shares, number) if self._shares else order

    def with_records(self, number: int, records: Sequence[Any]) -> Mixture:
        """The same, with a source's records read from elsewhere."""
        sources = list(self.sources)
        sources[number] = dataclasses.replace(sources[number], records=records)
        return Mixture(sources, self._shares)

    def _find(self, position: int) -> tuple[int, int]:
        number, own = self._shares.find(position) if self._shares else (0, position)
        return number, self.sources[number].order[own]

    def _locate(self, position: int) -> tuple[str, int]:
        number, record = self._find(position)
        records = self.sources[number].records
        return records.locate(record) if hasattr(records, "locate") else ("", record)


class DecodeMixture:
    """Decodes the elements of a mixture, each as its source wants it."""

    def __init__(self, mixture: Mixture):
        self._decoders = [source.decode for source in mixture.sources]

    def parse(self, element: tuple[int, Any]) -> tuple[int, Any]:
        """`DecodeExample.parse` for the number of a source and an element of it."""
        number, data = element
        return number, self._decoders[number].parse(data)

    def plan(
        self, parsed: tuple[int, Any], rng: np.random.Generator, position: int
    ) -> Callable[[], dict[str, Any]]:
        """`DecodeExample.plan` for what `parse` gave, at a position of the run."""
        number, record = parsed
        return self._decoders[number].plan(record, rng, position)


class SourcePlan:
    """A source's order in blocks, with the positions of the run in place of its own ones.

    Attributes:
        share: the largest that the source has in the run.
    """

    def __init__(self, order: BlockOrder, shares: Shares, number: int):
        """Args: the source's order, the shares of the run, and the number of the source."""
        self.block_starts = order.block_starts
        self.num_records = order.num_records
        self.num_streams = order.num_streams
        self.window_blocks = order.window_blocks
        self.share = shares.largest(number)
        self._order, self._shares, self._number = order, shares, number

    def upcoming_blocks(
        self, first_position: int, num_positions: int, process_index: int, process_count: int
    ) -> list[tuple[int, int, int]]:
        """As of `BlockOrder`; a last position that never comes is the largest number there is."""
        end = first_position + num_positions
        own = self._shares.own_range(self._number, first_position, end)
        if not own:
            return []
        return merge_needs(
            self._in_the_run(
                self._order.needs(own.start, len(own), process_index, process_count), first_position
            )
        )

    def _in_the_run(
        self, needs: Iterable[tuple[int, int, int]], first_position: int
    ) -> Iterator[tuple[int, int, int]]:
        # Of one stream at a time: between streams, own positions are in another order than the
        # positions of the run.
        for block, *need in needs:
            first, last = (self._shares.position(self._number, own) for own in need)
            last = sys.maxsize if last is None else last
            if first is not None and last >= first_position:
                yield block, max(first, first_position), last


def open_mixture(
    data: ml_collections.ConfigDict,
    seed: int,
    open_source: Callable[[str | list[str]], Any],
    make_decoder: Callable[[str], DecodeExample],
    process_count: int = 1,
    share: Share | None = None,
) -> Mixture:
    """The records of `config.data.train` in their orders and shares.

    Args:
        data: the section `config.data`.
        seed: of the orders; that of each source is drawn from it and the source's name.
        open_source: path -> records.
        make_decoder: text template -> what decodes records.
        process_count: how many hosts read them together.
        share: for a run of several processes, see `labels.rows.open_labels`.

    Raises:
        ValueError: the section is wrong, a source has no record, or labels are missing or belong
            to other records; names the key.
    """
    sources = []
    parsed = list(map(resolve_source, parse_train(data.train, data.get("labels"))))
    for source in parsed:
        records = _open_source(source, open_source)
        order = make_order(
            records, source.order or data.order, data, _source_seed(seed, source), process_count
        )
        if isinstance(order, GlobalOrder) and hasattr(records, "make_offsets_local"):
            records.make_offsets_local(data.cache_dir)
        decode = make_decoder(source.text_template or data.text_template)
        labels = clips = None
        if source.labels and decode.needs_labels:
            labels = _open_sidecars(open_labels, source, records, data, share)
        if source.labels and decode.needs_clip_embeddings:
            clips = _open_sidecars(open_clip_embeddings, source, records, data, share)
            if clips is not None:
                check_crops(clips, f"{_labels_key(source)}={source.labels}")
        decode = decode.for_source(records, labels, clips)
        sources.append(Source(source.name, records, order, decode, labels, clips))
    if not parsed[0].name:
        return Mixture(sources)
    in_blocks = any(isinstance(source.order, BlockOrder) for source in sources)
    points = [
        (step, [weight_at(source, step) for source in parsed]) for step in switching_steps(parsed)
    ]
    streams = count_streams(data, process_count) if in_blocks else 1
    return Mixture(sources, Shares(points, num_streams=streams, batch_size=data.batch_size))


def _open_sidecars(
    open_rows: Callable[..., Any],
    source: TrainSource,
    records: Any,
    data: ml_collections.ConfigDict,
    share: Share | None,
) -> Any:
    return open_rows(
        source.labels,
        records,
        _labels_key(source),
        share=share,
        cache_dir=data.cache_dir,
        patiently=functools.partial(try_patiently, timeout_secs=data.read_timeout_secs),
    )


def _labels_key(source: TrainSource) -> str:
    return f"config.data.train.{source.name}.labels" if source.name else "config.data.labels"


def _open_source(source: TrainSource, open_source: Callable[[str | list[str]], Any]) -> Any:
    key = f"config.data.train.{source.name}.path" if source.name else "config.data.train"
    try:
        records = open_source(source.path)
    except ValueError as error:
        if type(error) is not ValueError or not source.name:
            raise
        raise ValueError(f"{key}: {str(error).removeprefix('config.data.train: ')}") from error
    if not len(records):
        raise ValueError(f"{key}: {records!r} holds no record")
    return records


def _source_seed(seed: int, source: TrainSource) -> int:
    """Another one for each name, so that equal data would not come in the same order twice."""
    if not source.name:
        return seed
    words = [seed, *source.name.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])
