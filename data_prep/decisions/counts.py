"""Queries over decisions that the report shows: outcomes, histograms, names, labels.

Rows are added in tables, and the sums are the same for any order and division of the rows.
"""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc

from data_prep.decisions.funnel import Funnel
from data_prep.decisions.table import KEPT, SOURCE

DROPPED = "dropped"

# Histogram -> lower ends of its bins; the last bin has no upper end.
BINS: dict[str, tuple[int, ...]] = {
    "complexity": tuple(range(13)),
    "actions": tuple(range(7)),
    "caption_words": tuple(range(0, 37, 2)),
    "image_side": (0, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048),
}
NAMES = ("actions", "objects")
COLUMNS = (
    *("outcome", "reason", "label", "words", "complexity", "actions", "width", "height", "format"),
    *("looked", "object_names", "action_names"),
)

_MAX_NAMES = 1000  # that are reported of each kind
_COMPACT_ROWS = 2**18  # names that wait to be summed


class Counts:
    """Sums over the rows of decisions that were added."""

    def __init__(self) -> None:
        self._outcomes: collections.Counter[tuple[str, str | None]] = collections.Counter()
        self._labels: collections.Counter[tuple[str, str | None, str]] = collections.Counter()
        self._formats: collections.Counter[str] = collections.Counter()
        self._looked: collections.Counter[str] = collections.Counter()
        sides = (KEPT, DROPPED)
        self._bins = {(n, s): np.zeros(len(BINS[n]), np.int64) for n in BINS for s in sides}
        self._names: dict[tuple[str, str], list[pyarrow.Table]] = {
            (kind, side): [] for kind in NAMES for side in sides
        }

    def add(self, rows: pyarrow.Table) -> None:
        """Adds rows with the columns `COLUMNS`."""
        self._outcomes.update(_count(rows, "outcome", "reason"))
        labelled = rows.filter(pc.is_valid(rows["label"]))
        self._labels.update(_count(labelled, "outcome", "reason", "label"))
        for column, counter in (("format", self._formats), ("looked", self._looked)):
            found = _count(rows.filter(pc.is_valid(rows[column])), column)
            counter.update({value: count for (value,), count in found.items()})
        is_kept = pc.equal(rows["outcome"], KEPT)
        for side, chosen in ((KEPT, is_kept), (DROPPED, pc.invert(is_kept))):
            self._add_side(side, rows.filter(chosen))

    def funnel(self) -> Funnel:
        """Counts of outcomes, and what was done to find text."""
        looked = self._looked
        spotting = collections.Counter(
            {
                "read": looked["read"],
                "no_run": looked["no_run"],
                "gated": looked["gated"] + looked["audited"] + looked["missed"],
                "audited": looked["audited"] + looked["missed"],
                "missed": looked["missed"],
            }
        )
        return Funnel(dict(self._outcomes), +spotting)

    def image_formats(self) -> dict[str, int]:
        """Format -> kept pairs."""
        return dict(sorted(self._formats.items()))

    def measures(self) -> dict[str, Any]:
        """Histograms, frequent names and labels of the pairs, JSON-able.

        Returns:
            histograms: name of `BINS` -> "kept" or "dropped" -> lower end of the bin -> pairs. A
                pair counts where it was measured: a caption that a gate refused has no complexity,
                an image that nobody opened has no size.
            names: "actions" or "objects" -> "kept" or "dropped" -> name -> pairs whose first
                caption has it, of the most frequent.
            labels: outcome -> label -> pairs, where the config names a label.
        """
        histograms: dict[str, Any] = {name: {} for name in BINS}
        for (name, side), found in self._bins.items():
            filled = np.flatnonzero(found)
            histograms[name][side] = {str(BINS[name][i]): int(found[i]) for i in filled}
        names: dict[str, Any] = {kind: {} for kind in NAMES}
        for (kind, side), tables in self._names.items():
            order = [("count", "descending"), ("name", "ascending")]
            rows = _sum_names(tables).sort_by(order).slice(0, _MAX_NAMES)
            names[kind][side] = dict(
                zip(rows["name"].to_pylist(), rows["count"].to_pylist(), strict=True)
            )
        labels: dict[str, dict[str, int]] = {}
        for (stage, reason, label), pairs in sorted(self._labels.items(), key=str):
            outcome = stage if reason is None else f"{stage}/{reason}"
            labels.setdefault(outcome, {})[label] = pairs
        return {"histograms": histograms, "names": names, "labels": labels}

    def _add_side(self, side: str, rows: pyarrow.Table) -> None:
        words = rows.filter(pc.not_equal(rows["outcome"], SOURCE))["words"]
        measured = {
            "complexity": rows["complexity"],
            "actions": rows["actions"],
            "caption_words": words,
            "image_side": pc.min_element_wise(rows["width"], rows["height"]),
        }
        for name, values in measured.items():
            numbers = values.drop_null().to_numpy()
            places = np.searchsorted(BINS[name], numbers, side="right") - 1
            self._bins[name, side] += np.bincount(places, minlength=len(BINS[name]))
        for kind, column in (("actions", "action_names"), ("objects", "object_names")):
            found = pc.value_counts(pc.list_flatten(rows[column]))
            table = pyarrow.table({"name": found.field("values"), "count": found.field("counts")})
            tables = self._names[kind, side]
            tables.append(table)
            if sum(map(len, tables)) > _COMPACT_ROWS + 2 * len(tables[0]):
                self._names[kind, side] = [_sum_names(tables)]


def _count(rows: pyarrow.Table, *columns: str) -> dict[tuple[Any, ...], int]:
    """Number of rows for each combination of values."""
    counted = rows.select(columns).group_by(list(columns)).aggregate([([], "count_all")])
    values = [counted[name].to_pylist() for name in columns]
    return dict(zip(zip(*values, strict=True), counted["count_all"].to_pylist(), strict=True))


def _sum_names(tables: list[pyarrow.Table]) -> pyarrow.Table:
    if not tables:
        return pyarrow.table({"name": pyarrow.array([], pyarrow.string()), "count": []})
    total = pyarrow.concat_tables(tables).group_by("name").aggregate([("count", "sum")])
    return total.rename_columns({"count_sum": "count"})
