"""Complexity and action of the captions: C and A of CAT (DiHT, arXiv 2301.02280).

Of a pair with several captions the good ones are kept. How captions are parsed belongs in
`data_prep.captions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.batches.captions import CaptionFilter
from data_prep.captions import versions
from data_prep.captions.graph import GATE_REASONS
from data_prep.steps.base import Candidate, Drop, Step, check_integers
from data_prep.steps.recorded import NOT_KNOWN, PASSES, Recorded
from diht_jax.readers.base import SourceShard

_MOST_RECORDED = 255  # a larger complexity is recorded as this one


class CaptionStep(Step):
    """Parses the captions, and drops pairs without one that passes the gates, C and A."""

    name = "caption"
    order = 10
    reads = ("caption",)
    reasons = {
        "empty": "no words",
        "file_name": "file name",
        "url": "url",
        "not_english": "not english",
        "complexity": "C: complexity",
        "no_action": "A: no action",
    }
    timer = "captions"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        config.complexity = True  # C of CAT: drop captions of a complexity under min_complexity
        config.min_complexity = 1
        config.action = True  # A of CAT: drop captions without an action

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        check_integers({"min_complexity": (config.min_complexity, 0)})

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        """Where nothing is asked of the captions, the parser is not even loaded."""
        return _is_wanted(config) or config.metadata_only

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {"caption_rules": versions.RULES_VERSION} if _is_wanted(config) else {}

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return versions.package_versions()

    @classmethod
    def replay(
        cls,
        recorded: Recorded,
        before: ml_collections.ConfigDict,
        now: ml_collections.ConfigDict,
    ) -> np.ndarray:
        first, has_action = recorded.numbers("complexity"), recorded.numbers("actions") > 0
        is_gate = {
            reason: recorded.is_text("gate", reason)
            | (recorded.is_text("outcome", cls.name) & recorded.is_text("reason", reason))
            for reason in GATE_REASONS
        }
        is_parsed = np.logical_or.reduce([~np.isnan(first), *is_gate.values()])
        if not _drops(now):
            return np.where(is_parsed, PASSES, NOT_KNOWN)
        limits = caption_limits(now)
        least = limits["min_complexity"]
        several = recorded.numbers("captions") > 1
        if limits["require_action"]:
            best = np.where(has_action, first, np.nan)
            best = np.where(several, recorded.numbers("best_active_complexity"), best)
        else:
            best = np.where(several, recorded.numbers("best_complexity"), first)
        number = {reason: i for i, reason in enumerate(cls.reasons, 1)}
        found = np.where(first < least, number["complexity"], number["no_action"])
        for reason, holds in is_gate.items():
            found[holds] = number[reason]
        found[best >= least] = PASSES
        found[~is_parsed | ((best == _MOST_RECORDED) & (least > best))] = NOT_KNOWN
        return found

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._filter = CaptionFilter(**caption_limits(config))

    def judge(self, candidates: Sequence[Candidate]) -> Iterator[Candidate | Drop]:
        texts = [candidate.captions for candidate in candidates]
        judged = iter(self._filter.judge(list(itertools.chain(*texts))))
        for candidate in candidates:
            own = list(itertools.islice(judged, len(candidate.captions)))
            graphs, reasons = ([one[i] for one in own] for i in range(2))
            if not _drops(self.config):
                reasons = [None] * len(graphs)
            candidate = candidate._replace(graphs=graphs, all_graphs=graphs)
            good = candidate.choose([reason is None for reason in reasons])
            yield good if good.captions else Drop(candidate, reasons[0])


def caption_limits(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """C and A as arguments of `CaptionFilter` and of `captions.graph.cat_reason`."""
    return {
        "min_complexity": config.min_complexity if config.complexity else 0,
        "require_action": config.action,
    }


def _drops(config: ml_collections.ConfigDict) -> bool:
    return config.complexity or config.action


def _is_wanted(config: ml_collections.ConfigDict) -> bool:
    return _drops(config) or config.concepts
