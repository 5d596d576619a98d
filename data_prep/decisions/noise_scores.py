"""Precision and recall of each filter against known noise, where pairs carry a label.

The config names the label with `label_field`, such as the demo's, whose data names for every pair
what is wrong with it.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

from data_prep.decisions.funnel import spell_reason, stage_reasons
from data_prep.decisions.table import KEPT
from diht_jax.records.escaping import escape

_RECALL = "recall: "


@dataclasses.dataclass(frozen=True)
class FilterScore:
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
    arrived = total.copy()
    scores = []
    for outcome in sorted(labels, key=_order):
        if outcome == KEPT:
            continue
        scores.append(_score(_spell(outcome), labels[outcome], arrived, kinds, clean_label))
        arrived.subtract(labels[outcome])
    dropped = total.copy()
    dropped.subtract(labels.get(KEPT, {}))
    scores.append(_score("all filters", dropped, total, kinds, clean_label))
    return scores, kinds


def table_rows(labels: Mapping[str, Mapping[str, int]], clean_label: str) -> list[list[str]]:
    """The scores as text, the header first."""
    scores, kinds = score_filters(labels, clean_label)
    header = ["filter", "drops", "precision", *(f"{_RECALL}{_words(kind)}" for kind in kinds)]
    rows = [[*header, f"{_words(clean_label)} lost"]]
    for score in scores:
        shares = [score.precision, *(score.recall[kind] for kind in kinds), score.clean_lost]
        rows.append([score.name, f"{score.drops:,}", *map(_percent, shares)])
    return rows


def format_noise_table(labels: Mapping[str, Mapping[str, int]], clean_label: str) -> str:
    """The table for a terminal."""
    rows = [[escape(cell) for cell in row] for row in table_rows(labels, clean_label)]
    rows[0] = [cell.removeprefix(_RECALL) for cell in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    title = "against known noise; under each kind of it the recall, of the pairs that came so far:"
    return "\n".join([title, *lines])


def _score(
    name: str,
    dropped: Mapping[str, int],
    arrived: Mapping[str, int],
    kinds: Iterable[str],
    clean_label: str,
) -> FilterScore:
    drops = sum(dropped.values())
    noise = drops - dropped.get(clean_label, 0)

    def share(label: str) -> float | None:
        return dropped.get(label, 0) / arrived[label] if arrived.get(label) else None

    recall = {kind: share(kind) for kind in kinds}
    return FilterScore(name, drops, noise / drops if drops else 0.0, recall, share(clean_label))


def _spell(outcome: str) -> str:
    """C, A and T by their letters, what else drops pairs by its stage."""
    stage, _, reason = outcome.partition("/")
    spelled = spell_reason(stage, reason)
    return spelled if spelled[:2] in ("C:", "A:", "T:") else f"{stage}: {spelled}"


def _order(outcome: str) -> tuple[int, int, str]:
    """Sort key: the order in which a pair meets the outcomes."""
    stage, _, reason = outcome.partition("/")
    stages = stage_reasons()
    known = list(stages.get(stage, ()))
    number = list(stages).index(stage) if stage in stages else len(stages)
    return number, known.index(reason) if reason in known else len(known), outcome


def _words(label: str) -> str:
    return label.replace("_", " ")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"
