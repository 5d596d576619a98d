"""Duplicates of other pairs, by the table that `python -m data_prep.duplicates` has written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import logging
from ml_collections.config_dict import placeholder

from data_prep.duplicates.table import Lookup, hash_input, read_summary
from data_prep.sources import Input
from data_prep.steps.base import EVIDENCE, Candidate, Step
from diht_jax.readers.base import SourceShard

_LOOKED_AT = 32  # inputs that are compared with those of the table


class DuplicateStep(Step):
    """Drops the pairs that the table names by their keys."""

    name = "duplicates"
    order = 6  # a search in a sorted table
    reasons = {"exact": "copy of another image", "near": "near-duplicate of another image"}
    section = "duplicates"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        config.duplicates = ml_collections.ConfigDict()
        # The output folder of data_prep.duplicates on the same pairs; None: nothing is dropped.
        config.duplicates.table = placeholder(str)

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return config.duplicates.table is not None

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        folder = config.duplicates.table
        try:
            table = Lookup(folder)  # complete and whole, before any worker reads it
        except ValueError as error:
            raise ValueError(f"config.duplicates.table={error}") from error
        return super().describe_rules(config) | {"duplicates_table": table.digest}

    @classmethod
    def check_inputs(cls, config: ml_collections.ConfigDict, inputs: Sequence[Input]) -> None:
        folder = config.duplicates.table
        known = (read_summary(folder) or {}).get("inputs")
        looked_at = inputs[:: max(1, len(inputs) // _LOOKED_AT)]
        if known is None or any(hash_input(found.shard) in known for found in looked_at):
            return
        logging.warning(
            "config.duplicates.table='%s' was made of other files: none of the %d shards of "
            "config.input that were looked at has the name and size of one of its inputs. Pairs "
            "are dropped by their keys: where both data sets number theirs, the wrong ones",
            folder,
            len(looked_at),
        )

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._lookup = Lookup(config.duplicates.table)

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        found = self._lookup.find([candidate.pair.key for candidate in batch])
        columns: dict[str, list] = {self.name: [], EVIDENCE: []}
        for known in found:
            columns[self.name].append(None if known is None else known.kind)
            if known is None:
                columns[EVIDENCE].append(None)
            elif known.kind == "exact":
                columns[EVIDENCE].append(f"equal bytes: {known.duplicate_of}")
            else:
                similarity = f"similarity {known.similarity:.3f} with {known.duplicate_of}"
                columns[EVIDENCE].append(similarity)
        return columns
