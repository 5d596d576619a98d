"""The funnel: how many pairs came in, why and where pairs were dropped, how many were kept.

Stages and reasons are those of the filter steps, so that a new step shows itself; names that no
step of today knows come last.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from data_prep.decisions.table import KEPT, SOURCE
from data_prep.steps.registry import ordered_steps
from data_prep.text_spotting.config import describe_counts
from diht_jax.readers.base import SOURCE_REASONS


def stage_reasons() -> dict[str, Mapping[str, str]]:
    """Stage -> reason -> the words for people, all in the order in which a pair meets them."""
    source = {reason: _spell_plainly(reason) for reason in SOURCE_REASONS}
    return {SOURCE: source} | {step.name: step.reasons for step in ordered_steps()}


def spell_reason(stage: str, reason: str) -> str:
    """A reason for people: "no words" for the caption stage's "empty"."""
    return stage_reasons().get(stage, {}).get(reason) or _spell_plainly(reason)


def spell_outcome(outcome: str) -> str:
    """An outcome of the samples for people: "Kept", or "Dropped, caption: no words"."""
    if outcome == KEPT:
        return "Kept"
    stage, _, reason = outcome.partition("/")
    return f"Dropped, {stage}: {spell_reason(stage, reason)}"


def _spell_plainly(reason: str) -> str:
    """Names become words; a reason that is a phrase, with names of fields in it, stays."""
    return reason if " " in reason else reason.replace("_", " ")


@dataclasses.dataclass
class Funnel:
    """Counts of pairs.

    Attributes:
        outcomes: (stage, reason) -> pairs; the stage of those that were kept is "kept". A pair is
            counted once, at the first stage that drops it.
        text_spotting: what was done to find text: "read", "gated", "no_run"; of the gated
            "audited", and of these "missed".
        read: pairs that came in; by default those of `outcomes`.
    """

    outcomes: Mapping[tuple[str, str | None], int]
    text_spotting: Mapping[str, int] = dataclasses.field(default_factory=dict)
    read: int = -1

    def __post_init__(self) -> None:
        if self.read < 0:
            self.read = sum(self.outcomes.values())

    @property
    def kept(self) -> int:
        """Pairs that were kept."""
        return self.outcomes.get((KEPT, None), 0)

    def dropped(self) -> dict[str, dict[str, int]]:
        """Stage -> reason -> pairs, with all stages in their order."""
        found: dict[str, dict[str, int]] = {stage: {} for stage in stage_reasons()}
        for (stage, reason), pairs in sorted(self.outcomes.items(), key=str):
            if stage != KEPT:
                found.setdefault(stage, {})[reason] = pairs
        return found

    def share(self, pairs: int) -> float:
        """Part of the pairs that came in."""
        return pairs / self.read if self.read else 0.0

    def rows(self) -> list[tuple[str, str, int]]:
        """Stage, reason, pairs: what was read, the reasons as a pair meets them, what was kept."""
        rows = [("read", "", self.read)]
        stages = stage_reasons()
        for stage, found in self.dropped().items():
            known = stages.get(stage, {})
            order = [*(name for name in known if name in found), *sorted(found.keys() - set(known))]
            rows += [(stage, reason, found[reason]) for reason in order]
        return [*rows, (KEPT, "", self.kept)]

    def format_table(self) -> str:
        """The funnel as a table of counts and shares of what came in, and how text was found."""
        rows = [(stage, spell_reason(stage, reason), pairs) for stage, reason, pairs in self.rows()]
        reason_width = max(len(reason) for _, reason, _ in rows)
        count_width = max(len("pairs"), len(f"{self.read:,}"))
        width = max(8, *(len(stage) for stage, _, _ in rows))
        lines = [f"{'stage':{width}} {'reason':{reason_width}} {'pairs':>{count_width}}   share"]
        for stage, reason, count in rows:
            lines.append(
                f"{stage:{width}} {reason:{reason_width}} {count:>{count_width},}  "
                f"{100 * self.share(count):5.1f}%"
            )
        if self.text_spotting:
            lines.append(describe_counts(self.text_spotting))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {
            "read": self.read,
            "kept": self.kept,
            "dropped": self.dropped(),
            "text_spotting": dict(sorted(self.text_spotting.items())),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Funnel:
        """Reads the result of `to_json`."""
        outcomes: collections.Counter[tuple[str, str | None]] = collections.Counter()
        for stage, reasons in data["dropped"].items():
            outcomes.update({(stage, reason): pairs for reason, pairs in reasons.items()})
        outcomes[KEPT, None] = data["kept"]
        return cls(outcomes, data["text_spotting"])
