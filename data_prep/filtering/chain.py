"""Takes batches of pairs through the filter steps: each measures, decides, and narrows captions.

What is recorded of a pair belongs in `data_prep.decisions.log`, where pairs come from and what
becomes of those that remain in `shard` and `rows`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.decisions.log import ShardLog
from data_prep.steps.base import EVIDENCE, IMAGE_ERROR, Candidate, Columns, Step
from data_prep.steps.image import ImageStep
from diht_jax.readers.base import Skipped, SourceShard
from diht_jax.records.schema import Pair

# Makes of a pair that no step has dropped what is written, and logs it; None writes nothing.
Encode = Callable[[Candidate, ShardLog], Any]


class Chain:
    """The steps of one shard, at work on its entries."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        steps: Sequence[type[Step]],
        source: SourceShard,
        log: ShardLog,
        encode: Encode,
        write: Callable[[Any], object],
        report: Callable[[int], None] = lambda pairs: None,
    ):
        """Loads the steps.

        Args:
            config: of `config.default_config`.
            steps: of `steps.registry.active_steps`.
            source: the shard.
            log: gets what happens to every entry.
            encode: makes of a pair that remains what is written.
            write: takes what `encode` makes.
            report: called with the number of pairs that are done, now and then.
        """
        self._config, self._log, self._encode, self._write = config, log, encode, write
        self._report = report
        self._first = 0
        self._open_trial = functools.partial(Chain, config, steps, source, encode=encode)
        with log.clock("loading"):
            self._steps = [step(config, source) for step in steps]

    def run(self, entries: Sequence[Pair | Skipped]) -> None:
        """Filters the next entries of the shard."""
        candidates = []
        for row, entry in enumerate(entries, self._first):
            if isinstance(entry, Skipped):
                self._log.skip(entry, row)
            else:
                candidates.append(Candidate.of(entry, row))
        self._first += len(entries)
        self._report(len(entries) - len(candidates))
        self._advance(candidates, self._steps)

    def try_one(self, pair: Pair) -> None:
        """Does to a pair alone what `run` does, to no effect; this process may die of it."""
        self._trial._advance([Candidate.of(pair)], self._trial._steps)

    @functools.cached_property
    def _trial(self) -> Chain:
        return self._open_trial(log=ShardLog(self._config), write=lambda encoded: None)

    def close(self) -> dict[str, object]:
        """Ends the shard; returns the facts that the steps state about it."""
        facts: dict[str, object] = {}
        for step in self._steps:
            facts |= step.close()
        return facts

    def _advance(self, candidates: list[Candidate], steps: Sequence[Step]) -> None:
        """Takes candidates through the steps that are left, and writes those that remain.

        From a step with a batch size on they go in groups, so that a slow step shows its progress.
        """
        for number, step in enumerate(steps):
            size = step.batch_size(self._config)
            if size is not None and size < len(candidates):
                for start in range(0, len(candidates), size):
                    self._advance(candidates[start : start + size], steps[number:])
                return
            if candidates:
                with self._log.clock(step.timer or step.name):
                    remaining = apply_step(step, candidates, self._config, self._log)
                self._report(len(candidates) - len(remaining))
                candidates = remaining
        with self._log.clock("writing"):
            for candidate in candidates:
                encoded = self._encode(candidate, self._log)
                if encoded is not None:
                    self._write(encoded)
        self._report(len(candidates))


def apply_step(
    step: Step, batch: Sequence[Candidate], config: ml_collections.ConfigDict, log: ShardLog
) -> list[Candidate]:
    """Measures pairs and decides about them.

    Args:
        step: of the chain.
        batch: at least one pair; all have come through the same steps.
        config: of the filter.
        log: gets the pairs that are dropped.

    Returns:
        The other pairs, with their good captions.
    """
    measured = dict(step.measure(batch))
    evidence = measured.pop(EVIDENCE, None) or [None] * len(batch)
    for name, column in measured.items():
        for candidate, value in zip(batch, column, strict=True):
            candidate.values[name] = value
    deciding: list[type[Step]] = [type(step)]
    if IMAGE_ERROR in measured and not isinstance(step, ImageStep):
        deciding.insert(0, ImageStep)
        for candidate in batch:
            if candidate.values[IMAGE_ERROR] is not None:  # the size is that of a header that lied
                candidate.values |= {"width": None, "height": None}
    columns = Columns({n: [c.values[n] for c in batch] for n in batch[0].values}, len(batch))
    drops: list[tuple[str, str] | None] = [None] * len(batch)
    for decider in deciding:
        for reason, holds in decider.decide(columns, config).items():
            for i in np.flatnonzero(holds):
                drops[i] = drops[i] or (decider.name, reason)
    remaining = []
    for candidate, drop, shown in zip(batch, drops, evidence, strict=True):
        if drop is None:
            remaining.append(candidate)
        else:
            log.drop(candidate, *drop, evidence=shown if drop[0] == step.name else None)
    _narrow(step, remaining, config)
    return remaining


def _narrow(step: Step, batch: Sequence[Candidate], config: ml_collections.ConfigDict) -> None:
    """Drops those of several captions about each of which the step decides that it is not good."""
    several = [c for c in batch if c.of_captions and len(c.captions) > 1]
    if several:
        names = several[0].of_captions
        flat = {n: list(itertools.chain(*(c.of_captions[n] for c in several))) for n in names}
        ends = np.cumsum([len(candidate.captions) for candidate in several])
        is_good = np.ones(int(ends[-1]), bool)
        for holds in step.decide(Columns(flat, len(is_good)), config).values():
            is_good &= ~holds
        for candidate, own in zip(several, np.split(is_good, ends[:-1]), strict=True):
            candidate.keep_captions(own.tolist())
    for candidate in batch:
        candidate.of_captions = {}
