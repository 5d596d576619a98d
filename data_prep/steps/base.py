"""The form of a filter step: what it is called, what it reads, why it drops pairs, how it decides.

A step decides about candidates and records nothing: counts, samples and lists are made by whoever
runs it, so that every step is counted in the same way.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import ml_collections
import numpy as np

from data_prep.captions.graph import CaptionGraph
from data_prep.jobs.manifest import Input
from data_prep.steps.recorded import AS_RECORDED, NOT_KNOWN, Recorded
from data_prep.text_spotting.spotter import Spot
from diht_jax.readers.base import SourceShard
from diht_jax.records.captions import all_captions
from diht_jax.records.schema import Pair


class Candidate(NamedTuple):
    """A pair on its way through the steps.

    Attributes:
        pair: as it came.
        captions: those that are still good, at least one.
        graphs: of these captions; none where captions are not parsed.
        all_graphs: of all captions of the pair, its first one first, also those that were not good.
        header: format, width and height of the image once it was checked.
        spots: the text that was spotted in the image.
        scores: what steps have measured, by the names of their `Step.scores`.
        matches: for each caption that text was spotted for, the text that repeats it, or None.
        row: number of the pair among the entries of its shard; None where nobody counts them.
    """

    pair: Pair
    captions: list[str]
    graphs: Sequence[CaptionGraph] = ()
    all_graphs: Sequence[CaptionGraph] = ()
    header: tuple[str, int, int] | None = None
    spots: tuple[Spot, ...] = ()
    scores: Mapping[str, float] = {}  # never changed in place
    matches: Sequence[str | None] = ()
    row: int | None = None

    @property
    def first_graph(self) -> CaptionGraph | None:
        """Of the first caption of all; None where captions are not parsed."""
        return self.all_graphs[0] if self.all_graphs else None

    def choose(self, is_good: Sequence[bool]) -> Candidate:
        """The candidate with its good captions only."""
        graphs = self.graphs and list(itertools.compress(self.graphs, is_good))
        return self._replace(
            captions=list(itertools.compress(self.captions, is_good)), graphs=graphs
        )


class Drop(NamedTuple):
    """A candidate that does not go on.

    Attributes:
        candidate: with what is known of it.
        reason: one of the step's reasons.
        stage: name of the step that it is counted at; None for the one that dropped it.
        match: the spotted text that repeats the caption.
        evidence: for people, what of the pair decided, such as "punsafe = 0.83".
        match_chars: the longest run that could have been asked for to drop the pair by its text.
    """

    candidate: Candidate
    reason: str
    stage: str | None = None
    match: str | None = None
    evidence: str | None = None
    match_chars: int | None = None


class Step:
    """One step. The class describes it, an instance works on one shard.

    A step that looks at one candidate at a time overrides `find_reason`; one that narrows or
    completes candidates, or works on many together, overrides `judge`.

    Attributes:
        name: of the stage, in the statistics and the funnel.
        order: steps run from the lowest to the highest; those of today have from 5
            (conditions on the metadata) to 30 (text-spotting), the cheapest first.
        reads: of "caption", "image" and "metadata". Only steps that do not read the image run where
            tables are filtered without images (`config.metadata_only`).
        reasons: why it drops pairs -> the words for people, in the order in which it asks.
        scores: what it measures of every pair that comes to it, a number each -> the words for
            people; it puts them into `Candidate.scores`, and they are recorded.
        timer: its name among the times; None for `name`.
        section: its section of the config, if it has one; hashed only where the step is active.
        not_hashed: keys of the section that do not decide what is written.
        rules_version: raised whenever the step comes to decide otherwise.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    reads: ClassVar[tuple[str, ...]] = ("caption",)
    reasons: ClassVar[Mapping[str, str]]
    scores: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    timer: ClassVar[str | None] = None
    section: ClassVar[str | None] = None
    not_hashed: ClassVar[tuple[str, ...]] = ()
    rules_version: ClassVar[int] = 1

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        """Adds the step's keys to a config of defaults."""

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        """Checks what types cannot tell.

        Raises:
            ValueError: a value is out of its range.
        """

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        """Whether the step runs. One that is off by default leaves folders of before valid."""
        return True

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """What decides beside the config; hashed where the step is active."""
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
        """At most so many candidates at a time, where the step takes long; None for all."""
        return None

    @classmethod
    def settings(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        """The step's keys of a config that decide."""
        own = ml_collections.ConfigDict()
        cls.add_defaults(own)
        found = {name: value for name, value in config.to_dict().items() if name in own}
        if cls.section is not None:
            section = found[cls.section].items()
            found[cls.section] = {k: v for k, v in section if k not in cls.not_hashed}
        return found

    @classmethod
    def replay(
        cls,
        recorded: Recorded,
        before: ml_collections.ConfigDict,
        now: ml_collections.ConfigDict,
    ) -> np.ndarray:
        """Decides anew about pairs by what was recorded of them; a step with limits overrides it.

        Args:
            recorded: of n pairs.
            before: the config by which they were filtered; the step was active.
            now: another one; the step is active.

        Returns:
            int64 [n], see `recorded`. Never a guess: what the columns do not decide is `NOT_KNOWN`.
        """
        is_same = cls.settings(before) == cls.settings(now)
        return np.full(len(recorded), AS_RECORDED if is_same else NOT_KNOWN)

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        """Loads what the step needs.

        Args:
            config: of `filtering.config.default_config`.
            source: the shard that is filtered.
        """
        self.config = config

    def find_reason(self, candidate: Candidate) -> str | None:
        """Why the candidate is dropped; None where it goes on."""
        raise NotImplementedError

    def judge(self, candidates: Sequence[Candidate]) -> Iterator[Candidate | Drop]:
        """Decides about candidates: each in order as it goes on, or a `Drop` of it."""
        for candidate in candidates:
            reason = self.find_reason(candidate)
            yield candidate if reason is None else Drop(candidate, reason)

    def record(self, log: Any) -> None:
        """Adds what the step counted beside its drops to a `ShardLog`, once the shard is done."""


def check_integers(least: Mapping[str, tuple[Any, int]]) -> None:
    """Raises a ValueError unless every value is None or an integer of at least so much.

    Args:
        least: key of the config -> value, minimum.
    """
    for name, (value, minimum) in least.items():
        if value is not None and (not isinstance(value, int) or value < minimum):
            raise ValueError(f"config.{name}={value!r}; expected an integer of at least {minimum}")


def begin(pairs: Iterable[Pair], rows: Iterable[int | None] | None = None) -> list[Candidate]:
    """Pairs before the first step.

    Args:
        pairs: of the input.
        rows: their numbers among all its entries.
    """
    rows = itertools.repeat(None) if rows is None else rows
    return [
        Candidate(pair, all_captions(pair), row=row) for pair, row in zip(pairs, rows, strict=False)
    ]
