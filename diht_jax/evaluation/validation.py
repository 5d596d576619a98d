"""Retrieval on the records that a run holds out: `config.data.validation_share`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import ml_collections

from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.protocols.base import Task
from diht_jax.input.pipeline import open_records
from diht_jax.readers.base import Skipped
from diht_jax.records.labels.shards import resolve_source
from diht_jax.records.schema import Pair
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.train_data import TrainSource, held_out_records, parse_train
from diht_jax.storage.files import map_many

NAME = "validation"

# Small enough that all hosts have some.
_RECORDS_PER_UNIT = 64


@dataclasses.dataclass(frozen=True)
class ValidationTask(Task):
    """Retrieval on the held-out records of one source.

    Attributes:
        config: of the run.
        train_source: of `config.data.train`.
    """

    config: ml_collections.ConfigDict = dataclasses.field(kw_only=True)
    train_source: TrainSource = dataclasses.field(kw_only=True)

    def open_units(self) -> Units:
        """The held-out records, some in each part."""
        records = open_records(self.train_source.path)
        held_out = held_out_records(records, self.config.data, self.config.seed)
        starts = range(0, len(held_out), _RECORDS_PER_UNIT)
        parts = [held_out[start : start + _RECORDS_PER_UNIT] for start in starts]
        units = [functools.partial(_read, records, part) for part in parts]
        return Units(units, lambda: len(held_out))


def validation_tasks(config: ml_collections.ConfigDict) -> list[ValidationTask]:
    """Retrieval on what a run holds out, with the captions as it trains on them.

    Returns:
        One task for each source, called "validation", of several sources "validation_NAME"; none
        where nothing is held out.

    Raises:
        ValueError: `config.data.train` is wrong.
    """
    data = config.data
    if not data.get("validation_share"):
        return []
    sources = map(resolve_source, parse_train(data.train, data.get("labels")))
    return [
        ValidationTask(
            name=f"{NAME}_{source.name}" if source.name else NAME,
            kind="retrieval",
            source=f"{data.validation_share:.3g} of {source.path}",
            caption_template=source.text_template or data.text_template,
            config=config,
            train_source=source,
        )
        for source in sources
    ]


def _read(records: ShardedRecords, numbers: Iterable[int]) -> Iterator[Pair | Skipped]:
    return map_many(lambda number: records.decode(records[int(number)]), numbers)
