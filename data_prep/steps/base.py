"""Base class of filter steps: what a step measures, and how it decides.

A step measures batches of pairs into columns, and decides from the columns and the config. The
columns are recorded (`data_prep.decisions`), so `decide` also runs when a finished folder is
replayed with other limits. Steps do not record or count anything themselves.
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

EVIDENCE = "evidence"  # column of texts for the report: what in the pair decided
IMAGE_ERROR = "image_error"  # column: why the image cannot be decoded, set by any step


@dataclasses.dataclass(slots=True)
class Candidate:
    """A pair and what the steps so far have measured of it.

    Attributes:
        pair: the pair as read.
        captions: the captions that have passed so far, at least one.
        row: index of the pair among the entries of its shard.
        graphs: parsed captions, parallel to `captions`; empty if captions are not parsed.
        first_graph: graph of the pair's first caption, even if that caption was dropped.
        spots: text spotted in the image.
        values: column -> measured value, or None.
        of_captions: column -> the current step's values, one for each of `captions`. They decide
            which of several captions are kept.
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
        """Creates the candidate for a pair, before the first step."""
        captions = all_captions(pair)
        return cls(pair, captions, row, values={"captions": len(captions)})

    def keep_captions(self, is_good: Sequence[bool]) -> None:
        """Keeps only the captions that are good."""
        if self.graphs:
            self.graphs = [g for g, good in zip(self.graphs, is_good, strict=True) if good]
        self.captions = [c for c, good in zip(self.captions, is_good, strict=True) if good]


@dataclasses.dataclass(eq=False)
class Columns:
    """Columns of n pairs, measured by steps or read from recorded decisions.

    Columns are converted to arrays on first use.
    """

    columns: Mapping[str, pyarrow.Array | Sequence[Any]]  # missing, None or null: not measured
    length: int  # n
    _arrays: dict[str, pyarrow.Array] = dataclasses.field(default_factory=dict)
    _masks: dict[str, dict[str, np.ndarray]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return self.length

    def numbers(self, name: str) -> np.ndarray:
        """Returns a numeric column, float64 [n], with NaN for values that were not measured."""
        values = self._array(name).to_numpy(zero_copy_only=False)
        return values.astype(np.float64)

    def has(self, name: str) -> np.ndarray:
        """Returns which pairs have a value in a column, bool [n]."""
        return self._array(name).is_valid().to_numpy(zero_copy_only=False)

    def is_text(self, name: str, value: str) -> np.ndarray:
        """Returns which pairs have the given text in a column, bool [n]."""
        return self.texts(name).get(value, np.zeros(self.length, bool))

    def texts(self, name: str) -> dict[str, np.ndarray]:
        """Returns text -> which pairs have that text in a column, bool [n]."""
        if name not in self._masks:
            array, self._masks[name] = self._array(name), {}
            if not pyarrow.types.is_null(array.type):
                array = array.dictionary_encode()
                codes = array.indices.fill_null(-1).to_numpy(zero_copy_only=False)
                texts = enumerate(array.dictionary.to_pylist())
                self._masks[name] = {text: codes == number for number, text in texts}
        return self._masks[name]

    def reasons(self, stage: str) -> dict[str, np.ndarray]:
        """Returns reason -> the pairs that a stage drops for that reason, bool [n].

        Reasons are read from the column named like the stage if there is one, else from the
        recorded outcome and reason.
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
    """A filter step. The class describes the step and decides; an instance measures one shard.

    Attributes:
        config, source: of one shard. A subclass's `__init__` loads what it needs for measuring.
        name: name of the stage in the statistics and the funnel.
        order: position: steps run in ascending order, from 5 (conditions on metadata) to 30
            (text-spotting), cheap ones first.
        reads: some of "caption", "image" and "metadata". If tables are filtered without images
            (`config.metadata_only`), only steps that do not read the image run.
        reasons: reasons for dropping pairs -> their text in reports, in order of precedence.
        scores: numeric columns that the step adds to the decisions -> their text in reports.
        bins: score -> lower edges of the histogram's bins, evenly spaced.
        limits: settings that only `decide` reads, so a replay may change them.
        keys: dotted names of the step's config keys -> a `Key`, or a default without a range.
        timer: name of the step's timer; None uses `name`.
        section: config section of the step, if any; hashed only if the step is active.
        not_hashed: keys of the section that do not affect the output.
        rules_version: raise this with every change that may alter a decision.
        switch: key that enables the step by a value other than None, False or (); None: always on.
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
        """Checks constraints that types and ranges cannot express.

        Raises:
            ValueError: values contradict each other.
        """

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        """Whether the step runs. A new step that is off by default keeps finished folders valid."""
        value = operator.attrgetter(cls.switch)(config) if cls.switch else True
        return bool(value) or value == ""  # the step itself rejects an empty name

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """Returns what decisions depend on besides the config; hashed if the step is active."""
        return {f"{cls.name}_rules": cls.rules_version}

    @classmethod
    def check_inputs(cls, config: ml_collections.ConfigDict, inputs: Sequence[Input]) -> None:
        """Warns if the step has no effect on these inputs. Called once per job."""

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        """Returns versions of the packages in use, which are recorded but not hashed."""
        return {}

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        """Returns the largest batch for a slow `measure`, or None for no limit."""
        return None

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        """Measures pairs.

        Args:
            batch: pairs. The step may set their `graphs`, `spots` and `of_captions`.

        Returns:
            Columns with one value per pair: some of `decisions.table.COLUMNS` and of `scores`,
            `EVIDENCE`, and for a step without `decide` the reason, in a column of its name.
        """
        return {}

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        """Decides about n pairs from their columns.

        The default is for steps that measure the reason itself, in a column named like the step.

        Returns:
            Reason -> the pairs it holds for, bool [n]. The first reason that holds counts.
        """
        return columns.reasons(cls.name)

    @classmethod
    def find_unknown(
        cls, columns: Columns, before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
    ) -> np.ndarray:
        """Finds pairs that cannot be decided with another config from the recorded columns.

        Args:
            columns: of the n pairs that reached the step under the old config.
            before: the old config, under which the step was active.
            now: the new config, under which the step is active.

        Returns:
            bool [n]. Default: all pairs if any setting differs that is not one of `limits`.
        """
        old, new = cls.settings(before), cls.settings(now)
        differ = any(new[name] != old[name] for name in new if name not in cls.limits)
        return np.full(len(columns), differ)

    @classmethod
    def settings(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """Returns the settings that decide; keys of the step's section omit the section's name."""
        values = config.to_dict()
        found = {name: values[name] for name in cls.keys if "." not in name}
        section = values[cls.section] if cls.section is not None else {}
        return found | {k: v for k, v in section.items() if k not in cls.not_hashed}

    def close(self) -> dict[str, Any]:
        """Finishes the shard: logs warnings, and returns facts for its statistics."""
        return {}
