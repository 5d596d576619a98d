"""Captions that their picture shows as text: T of CAT (DiHT, arXiv 2301.02280).

How text is spotted and matched belongs in `data_prep.text_spotting`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep.batches.text import TextSpotter
from data_prep.steps.base import Candidate, Drop, Step
from data_prep.steps.captions import CaptionStep, caption_limits
from data_prep.steps.image import ImageStep
from data_prep.steps.recorded import AS_RECORDED, NOT_KNOWN, Recorded
from data_prep.text_spotting import config as spotter_config
from data_prep.text_spotting.cache import name_shard
from data_prep.text_spotting.looks import longest_match
from data_prep.text_spotting.weights import easyocr_version
from diht_jax.readers.base import SourceShard


class TextStep(Step):
    """Drops pairs of whose captions every one stands in the picture."""

    name = "text"
    order = 30
    reads = ("caption", "image")
    reasons = {"shows_caption": "T: shows its caption"}
    section = "spotter"
    not_hashed = spotter_config.NOT_HASHED

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        config.text_spotting = True  # T of CAT: drop captions that their picture shows as text
        config.spotter = spotter_config.default_spotter()

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        spotter_config.check_spotter(config.spotter)

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        return config.text_spotting

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {"spotting_rules": spotter_config.RULES_VERSION, "easyocr": easyocr_version()}

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return {"easyocr": easyocr_version()}

    @classmethod
    def batch_size(cls, config: ml_collections.ConfigDict) -> int | None:
        return config.spotter.window

    @classmethod
    def replay(
        cls,
        recorded: Recorded,
        before: ml_collections.ConfigDict,
        now: ml_collections.ConfigDict,
    ) -> np.ndarray:
        old, new = (cls.settings(config)["spotter"] for config in (before, now))
        differing = [name for name in new if new[name] != old[name]]
        found = np.full(len(recorded), AS_RECORDED)
        dropped = recorded.is_text("outcome", cls.name)
        several = recorded.numbers("captions") > 1
        if set(differing) - {"min_chars", "min_confidence"}:
            found[:] = NOT_KNOWN
        # By stricter limits of a match only pairs that were dropped may pass, by laxer ones only
        # pairs that passed may be dropped.
        if "min_chars" in differing:
            if new["min_chars"] < old["min_chars"]:
                found[~dropped] = NOT_KNOWN
            found[dropped & (recorded.numbers("match_chars") < new["min_chars"])] = NOT_KNOWN
        if "min_confidence" in differing:
            if new["min_confidence"] < old["min_confidence"]:
                found[~dropped] = NOT_KNOWN
            confidence = recorded.numbers("match_confidence")
            is_sure = (confidence >= np.float32(new["min_confidence"])) & ~several
            found[dropped & ~is_sure] = NOT_KNOWN
        # Of several captions others may come here now than those that were looked for.
        fewer, more = _compare_captions(before, now)
        if more:
            found[several & dropped] = NOT_KNOWN
        if fewer:
            unmatched = recorded.numbers("matches") == 0
            found[several & ~dropped & ~(unmatched & (not more))] = NOT_KNOWN
        return found

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        self._spotter = TextSpotter(
            **config.spotter.to_dict(),
            max_pixels=config.image.max_pixels,
            shard=name_shard(source.path, source.start, source.stop),
        )
        self._counts: collections.Counter[str] = collections.Counter()
        self._machine: dict[str, str] | None = None

    def judge(self, candidates: Sequence[Candidate]) -> Iterator[Candidate | Drop]:
        verdicts = self._spotter.judge(
            [candidate.pair.image for candidate in candidates],
            [candidate.captions for candidate in candidates],
        )
        counts = spotter_config.count_verdicts(verdicts)
        self._counts.update(counts)
        if self._machine is None and (counts["gated"] or counts["read"]):
            self._machine = spotter_config.describe_machine(self._spotter.settings)
        for candidate, verdict in zip(candidates, verdicts, strict=True):
            if verdict.error is not None:
                # Its size was read from a header that lied.
                without_size = candidate._replace(header=None)
                yield Drop(without_size, verdict.error.reason, stage=ImageStep.name)
                continue
            candidate = candidate._replace(spots=verdict.spots, matches=verdict.matches)
            good = candidate.choose([match is None for match in verdict.matches])
            if good.captions:
                yield good
            else:
                longest = min(
                    longest_match(text, caption, self._spotter.settings)
                    for text, caption in zip(verdict.matches, candidate.captions, strict=True)
                )
                yield Drop(
                    candidate, "shows_caption", match=verdict.matches[0], match_chars=longest
                )

    def record(self, log: Any) -> None:
        log.funnel.text_spotting.update(self._counts)
        log.spotter = self._machine


def _compare_captions(
    before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> tuple[bool, bool]:
    """Whether fewer, and whether more of several captions may pass the caption step now."""
    if CaptionStep.settings(before) == CaptionStep.settings(now):
        return False, False
    old, new = (
        (limits["min_complexity"], limits["require_action"])
        if CaptionStep.is_active(config) and (config.complexity or config.action)
        else (-1, False)  # not even a gate drops any
        for config, limits in ((config, caption_limits(config)) for config in (before, now))
    )
    return (
        any(b > a for a, b in zip(old, new, strict=True)),
        any(b < a for a, b in zip(old, new, strict=True)),
    )
