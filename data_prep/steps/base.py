"""The form of a filter step: its name and reasons, what it measures, and how it decides.

A step measures a batch of pairs into columns, and decides from columns and config. The columns are
recorded (`data_prep.decisions`), so that the same `decide` runs while pairs are filtered and when a
finished folder is replayed with other limits. Steps record and count nothing themselves.
"""

from __future__ import annotations

import dataclasses
import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import ml_collections
import numpy as np
import pyarrow

from data_prep.captions.graph import CaptionGraph
from data_prep.sources import Input
from data_prep.text_spotting.spotter import Spot
from diht_jax.readers.base import SourceShard
from diht_jax.records.samples import all_captions
from diht_jax.records.schema import Pair

EVIDENCE = "evidence"  # column of texts for people: what of the pair decides; shown in the report
IMAGE_ERROR = "image_error"  # column: why the image cannot be decoded, whichever step finds out


@dataclasses.dataclass(slots=True)
class Candidate:
    """A pair on its way through the steps.

    Attributes:
        pair: as read.
        captions: those that are still good, at least one.
        row: number of the pair among the entries of its shard.
        graphs: parsed captions, parallel to `captions`; empty where captions are not parsed.
        first_graph: of the pair's first caption, also where that one was not good.
        spots: the text that was spotted in the image.
        values: column -> what was measured, None for nothing.
        of_captions: what the step at work has measured of each of `captions`, column by column; it
            decides which of several captions stay.
    """

    pair: Pair
    captions: list[str]
    row: int = 0
    graphs: Sequence[CaptionGraph] = ()
    first_graph: CaptionGraph | None = None
    spots: tuple[Spot, ...] = ()
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    of_captions: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, pair: Pair, row: int = 0) -> Candidate:
        """A pair before the first step."""
        captions = all_captions(pair)
        return cls(pair, captions, row, values={"captions": len(captions)})

    def keep_captions(self, is_good: Sequence[bool]) -> None:
        """Drops the captions that are not good."""
        if self.graphs:
            self.graphs = [g for g, good in zip(self.graphs, is_good, strict=True) if good]
        self.captions = [c for c, good in zip(self.captions, is_good, strict=True) if good]


@dataclasses.dataclass(eq=False)
class Columns:
    """The columns of n pairs: what steps have measured, or what decisions have recorded.

    They are converted when they are asked for.
    """

    columns: Mapping[str, pyarrow.Array | Sequence[Any]]  # None or null: not measured
    length: int  # n
    _arrays: dict[str, pyarrow.Array] = dataclasses.field(default_factory=dict)
    _masks: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.length

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, float64 [n]; NaN where nothing was measured."""
        values = self._array(name).to_numpy(zero_copy_only=False)
        return values.astype(np.float64)

    def has(self, name: str) -> np.ndarray:
        """Mask of the pairs for which a column has a value, bool [n]."""
        return self._array(name).is_valid().to_numpy(zero_copy_only=False)

    def is_text(self, name: str, value: str) -> np.ndarray:
        """Mask of the pairs for which a column has this text, bool [n]."""
        return self.texts(name).get(value, np.zeros(self.length, bool))

    def texts(self, name: str) -> dict[str, np.ndarray]:
        """Each text of a column -> mask of its pairs, bool [n]."""
        if name not in self._masks:
            array, self._masks[name] = self._array(name), {}
            if not pyarrow.types.is_null(array.type):
                if not pyarrow.types.is_dictionary(array.type):
                    array = array.dictionary_encode()
                codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
                texts = enumerate(array.dictionary.to_pylist())
                self._masks[name] = {text: codes == number for number, text in texts}
        return self._masks[name]

    def reasons(self, stage: str) -> dict[str, np.ndarray]:
        """Each reason of a stage -> mask of its pairs, bool [n].

        The reasons are in a column of the stage's name, or else were recorded as those of the
        stage.
        """
        if stage in self.columns:
            return self.texts(stage)
        is_own = self.is_text("outcome", stage)
        return {reason: is_own & holds for reason, holds in self.texts("reason").items()}

    def _array(self, name: str) -> pyarrow.Array:
        if name not in self._arrays:
            found = self.columns.get(name)
            if found is None:
                found = pyarrow.nulls(self.length)
            self._arrays[name] = found if isinstance(found, pyarrow.Array) else pyarrow.array(found)
        return self._arrays[name]


@dataclasses.dataclass(eq=False)
class Step:
    """A filter step. The class describes it and decides; an instance measures one shard.

    Attributes:
        config, source: of one shard; an own `__init__` loads what the step needs to measure.
        name: of the stage, in the statistics and the funnel.
        order: steps run from the lowest to the highest: 5 (conditions on the metadata) to 30
            (text-spotting), the cheapest first.
        reads: some of "caption", "image" and "metadata". Only steps that do not read the image run
            where tables are filtered without images (`config.metadata_only`).
        reasons: why it drops pairs -> the words for people, in the order in which it asks.
        scores: columns of numbers that it adds to the decisions -> the words for people.
        bins: score -> lower ends of the bins of its histogram, at even distances.
        limits: settings that only `decide` reads; a replay may change them.
        keys: dotted names of its keys of the config -> a `Key`, or a default without a range.
        timer: its name among the times; None for `name`.
        section: its section of the config, if it has one; hashed only where the step is active.
        not_hashed: keys of the section that do not decide what is written.
        rules_version: raised whenever the step comes to decide otherwise.
        switch: the key that turns it on, by all but None, False and (); None: it always runs.
    """

    config: ml_collections.ConfigDict
    source: SourceShard

    name: ClassVar[str]
    order: ClassVar[int]
    reads: ClassVar[tuple[str, ...]] = ("caption",)
    reasons: ClassVar[Mapping[str, str]]
    scores: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    bins: ClassVar[Mapping[str, Sequence[float]]] = types.MappingProxyType({})
    limits: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[Mapping[str, Any]] = types.MappingProxyType({})
    timer: ClassVar[str | None] = None
    section: ClassVar[str | None] = None
    not_hashed: ClassVar[tuple[str, ...]] = ()
    rules_version: ClassVar[int] = 1
    switch: ClassVar[str | None] = None

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        """Checks what types and ranges cannot tell.

        Raises:
            ValueError: a value does not go with others.
        """

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        """True if the step runs; finished folders stay valid if a new step is off by default."""
        value = operator.attrgetter(cls.switch)(config) if cls.switch else True
        return bool(value) or value == ""  # a name that is empty is for the step to refuse

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """Versions and contents that decide, besides the config; hashed if the step is active."""
        return {f"{cls.name}_rules": cls.rules_version}

    @classmethod
    def check_inputs(cls, config: ml_collections.ConfigDict, inputs: Sequence[Input]) -> None:
        """Warns where the step has nothing to do with these inputs; called once in a job."""

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        """The versions of packages that take part; recorded, not hashed."""
        return {}

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        """Largest batch for `measure`, where the step takes long; None for any."""
        return None

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        """Measures pairs.

        Args:
            batch: the pairs; the step may set their `graphs`, `spots` and `of_captions`.

        Returns:
            Columns with a value for each pair: some of `decisions.table.COLUMNS` and of `scores`,
            `EVIDENCE`, and the step's own name for the reason of a step without `decide`.
        """
        return {}

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        """Decides about n pairs by what is known of them.

        Without an own `decide` a step measures the reason itself, in a column of its name.

        Returns:
            Reason -> where it holds, bool [n]; the first that holds counts.
        """
        return columns.reasons(cls.name)

    @classmethod
    def find_unknown(
        cls, columns: Columns, before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
    ) -> np.ndarray:
        """Finds pairs whose columns do not suffice to decide by another config.

        Args:
            columns: of n pairs that came to the step then.
            before: the config with which they were measured; the step was active.
            now: another one; the step is active.

        Returns:
            bool [n]. By default all pairs, where settings differ that are no limits.
        """
        old, new = cls.settings(before), cls.settings(now)
        differ = any(new[name] != old[name] for name in new if name not in cls.limits)
        return np.full(len(columns), differ)

    @classmethod
    def settings(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """The step's keys that decide, those of its section without the section's name."""
        values = config.to_dict()
        found = {name: values[name] for name in cls.keys if "." not in name}
        section = values[cls.section] if cls.section is not None else {}
        return found | {k: v for k, v in section.items() if k not in cls.not_hashed}

    def close(self) -> dict[str, Any]:
        """Ends the shard: gives warnings, and returns facts for its statistics."""
        return {}
