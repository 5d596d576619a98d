"""Takes batches of pairs through the filter steps: each measures, decides, and narrows captions.

What is recorded of a pair belongs in `data_prep.decisions.log`, where pairs come from and what
becomes of those that remain in `shard` and `rows`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import ml_collections
import numpy as np

from data_prep.decisions.log import ShardLog
from data_prep.jobs.crash_search import BATCH, PAIR, CrashSearch, WorkRecord
from data_prep.steps.base import EVIDENCE, IMAGE_ERROR, Candidate, Columns, Step
from data_prep.steps.image import ImageStep
from diht_jax.readers.base import Skipped, SourceShard
from diht_jax.records.schema import Pair

# Takes the pairs that no step has dropped, and the log that they are recorded in. The last argument
# is False where a pair is tried only: then nothing is written.
Finish = Callable[[Sequence[Candidate], ShardLog, bool], None]


class Chain:
    """The steps of one shard, at work on its entries."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        steps: Sequence[type[Step]],
        source: SourceShard,
        log: ShardLog,
        finish: Finish,
        *,
        work: WorkRecord,
        search: CrashSearch,
        report: Callable[[int], None] = lambda pairs: None,
    ):
        """Loads the steps.

        Args:
            config: of `config.default_config`.
            steps: of `steps.registry.active_steps`.
            source: the shard.
            log: gets what happens to every entry.
            finish: takes the pairs that remain.
            work: gets the batch that is worked on.
            search: for pairs that end their worker.
            report: called with the number of pairs that are done, now and then.
        """
        self._config, self._log, self._finish = config, log, finish
        self._work, self._search, self._report = work, search, report
        self._open: Callable[[], list[Step]] = lambda: [step(config, source) for step in steps]
        self._first = 0
        with log.clock("loading"):
            self._steps = self._open()

    def run(self, entries: Sequence[Pair | Skipped]) -> None:
        """Filters the next entries of the shard."""
        batch = self._first, self._first + len(entries)
        if self._search.suspects == batch:
            self._try_one_by_one(entries)
        self._work.write(BATCH, *batch)
        candidates = []
        for row, entry in enumerate(entries, self._first):
            if isinstance(entry, Skipped):
                self._log.skip(entry, row)
            else:
                candidates.append(Candidate.of(entry, row))
        self._first += len(entries)
        self._report(len(entries) - len(candidates))
        self._advance(candidates, self._steps, self._log, is_real=True)

    def close(self) -> dict[str, object]:
        """Ends the shard; returns the facts that the steps state about it."""
        facts: dict[str, object] = {}
        for step in self._steps:
            facts |= step.close()
        return facts

    def _try_one_by_one(self, entries: Sequence[Pair | Skipped]) -> None:
        """Does to each pair alone what is done to a batch; this process may die of it."""
        log, steps = ShardLog(self._config), self._open()
        for row, entry in enumerate(entries, self._first):
            if isinstance(entry, Pair):
                self._work.write(PAIR, row, row + 1)
                self._advance([Candidate.of(entry, row)], steps, log, is_real=False)

    def _advance(
        self, candidates: list[Candidate], steps: Sequence[Step], log: ShardLog, *, is_real: bool
    ) -> None:
        """Takes candidates through the steps that are left, and hands on those that remain.

        From a step with a batch size on they go in groups, so that a slow step shows its progress.
        """
        for number, step in enumerate(steps):
            size = step.batch_size(self._config)
            if size is not None and size < len(candidates):
                for start in range(0, len(candidates), size):
                    group = candidates[start : start + size]
                    self._advance(group, steps[number:], log, is_real=is_real)
                return
            if candidates:
                with log.clock(step.timer or step.name):
                    remaining = apply_step(step, candidates, self._config, log)
                if is_real:
                    self._report(len(candidates) - len(remaining))
                candidates = remaining
        with log.clock("writing"):
            self._finish(candidates, log, is_real)
        if is_real:
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
