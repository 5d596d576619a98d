"""The funnel: how many pairs came in, why and where pairs were dropped, how many were kept.

Stages and reasons are those of the filter steps, so that a new step shows itself; names that no
step of today knows come last. Where pairs carry a label (`label_field` of the config), such as in
the demo, whose data names for every pair what is wrong with it, each filter also has its precision
and recall against that known noise.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from data_prep.decisions.table import KEPT, SOURCE
from data_prep.steps.registry import ordered_steps
from diht_jax.readers.base import SOURCE_REASONS
from diht_jax.terminal import escape

_RECALL = "recall: "


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


def describe_spotting(counts: Mapping[str, Any]) -> str:
    """A sentence about what was done to find text."""
    text = (
        f"text-spotting: {counts.get('read', 0):,} pictures read, "
        f"{counts.get('gated', 0):,} without a trace of text at the first look, "
        f"{counts.get('no_run', 0):,} with captions that no spotter reads"
    )
    if audited := counts.get("audited", 0):
        missed = counts.get("missed", 0)
        text += f"; audit of the first look: {missed:,} of {audited:,} showed the caption"
    return text


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
        """Stage -> reason -> pairs, with all stages, in the order in which a pair meets them.

        What no step of today knows comes last.
        """
        found: dict[str, dict[str, int]] = {}
        for stage, reasons in stage_reasons().items():
            met = [reason for reason in reasons if (stage, reason) in self.outcomes]
            found[stage] = {reason: self.outcomes[stage, reason] for reason in met}
        for stage, reason in sorted(self.outcomes, key=str):
            if stage != KEPT and reason is not None:
                found.setdefault(stage, {}).setdefault(reason, self.outcomes[stage, reason])
        return found

    def share(self, pairs: int) -> float:
        """Part of the pairs that came in."""
        return pairs / self.read if self.read else 0.0

    def rows(self) -> list[tuple[str, str, int]]:
        """Stage, reason, pairs: what was read, the reasons as a pair meets them, what was kept."""
        rows = [("read", "", self.read)]
        for stage, found in self.dropped().items():
            rows += [(stage, reason, pairs) for reason, pairs in found.items()]
        return [*rows, (KEPT, "", self.kept)]

    def format_table(self) -> str:
        """The funnel as a table of counts and shares of what came in, and how text was found."""
        rows = [(stage, spell_reason(stage, reason), pairs) for stage, reason, pairs in self.rows()]
        stages, reasons, _ = zip(*rows, strict=True)
        width, reason_width = max(8, *map(len, stages)), max(map(len, reasons))
        count_width = max(len("pairs"), len(f"{self.read:,}"))
        lines = [f"{'stage':{width}} {'reason':{reason_width}} {'pairs':>{count_width}}   share"]
        for stage, reason, count in rows:
            lines.append(
                f"{stage:{width}} {reason:{reason_width}} {count:>{count_width},}  "
                f"{100 * self.share(count):5.1f}%"
            )
        if self.text_spotting:
            lines.append(describe_spotting(self.text_spotting))
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
        outcomes: dict[tuple[str, str | None], int] = {
            (stage, reason): pairs
            for stage, reasons in data["dropped"].items()
            for reason, pairs in reasons.items()
        }
        return cls(outcomes | {(KEPT, None): data["kept"]}, data["text_spotting"])


class FilterScore(NamedTuple):
    """One filter against the labels.

    Attributes:
        name: of the filter.
        drops: pairs that it dropped.
        precision: share of noise among them.
        recall: label of noise -> share that it dropped, of the pairs that came to it; None where
            none came.
        clean_lost: share of the clean pairs that it dropped, of those that came to it.
    """

    name: str
    drops: int
    precision: float
    recall: dict[str, float | None]
    clean_lost: float | None


def score_filters(
    labels: Mapping[str, Mapping[str, int]], clean_label: str
) -> tuple[list[FilterScore], list[str]]:
    """Scores every filter that dropped something, in their order, and all of them together.

    Args:
        labels: outcome -> label -> pairs, as in the measures of a report.
        clean_label: the label of good pairs; all others are noise.

    Returns:
        scores: the last one is of all filters.
        kinds: the labels of noise, the most frequent first.
    """
    total: collections.Counter[str] = collections.Counter()
    for counts in labels.values():
        total.update(counts)
    kinds = [label for label, _ in total.most_common() if label != clean_label]

    def score(name: str, dropped: Mapping[str, int], arrived: Mapping[str, int]) -> FilterScore:
        drops = sum(dropped.values())
        share = {
            label: dropped.get(label, 0) / arrived[label] if arrived[label] else None
            for label in (*kinds, clean_label)
        }
        precision = (drops - dropped.get(clean_label, 0)) / drops if drops else 0.0
        return FilterScore(name, drops, precision, share, share.pop(clean_label))

    scores, arrived = [], total.copy()
    outcomes = (outcome.partition("/") for outcome in labels)
    met = Funnel({(stage, reason): 1 for stage, _, reason in outcomes})
    for stage, reason, _ in met.rows()[1:-1]:
        spelled = spell_reason(stage, reason)
        if spelled[:2] not in ("C:", "A:", "T:"):  # the filters of the paper, by their letters
            spelled = f"{stage}: {spelled}"
        dropped = labels[f"{stage}/{reason}"]
        scores.append(score(spelled, dropped, arrived))
        arrived.subtract(dropped)
    dropped = total.copy()
    dropped.subtract(labels.get(KEPT, {}))
    return [*scores, score("all filters", dropped, total)], kinds


def table_rows(labels: Mapping[str, Mapping[str, int]], clean_label: str) -> list[list[str]]:
    """The scores as text, the header first."""
    scores, kinds = score_filters(labels, clean_label)
    words = [label.replace("_", " ") for label in (*kinds, clean_label)]
    header = ["filter", "drops", "precision", *(f"{_RECALL}{word}" for word in words[:-1])]
    rows = [[*header, f"{words[-1]} lost"]]
    for score in scores:
        shares = [score.precision, *(score.recall[kind] for kind in kinds), score.clean_lost]
        cells = ["-" if share is None else f"{100 * share:.1f}%" for share in shares]
        rows.append([score.name, f"{score.drops:,}", *cells])
    return rows


def format_noise_table(labels: Mapping[str, Mapping[str, int]], clean_label: str) -> str:
    """The table for a terminal."""
    rows = [[escape(cell) for cell in row] for row in table_rows(labels, clean_label)]
    rows[0] = [cell.removeprefix(_RECALL) for cell in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    title = "against known noise; under each kind of it the recall, of the pairs that came so far:"
    lines = [title]
    for name, *cells in rows:
        others = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
