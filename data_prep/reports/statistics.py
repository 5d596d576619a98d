"""What the pairs of a shard look like: histograms, frequent names, and pairs by a label of theirs.

Counts of reasons belong in `funnel`.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import heapq
import itertools
from collections.abc import Mapping
from typing import Any

from data_prep.captions.graph import CaptionGraph

KEPT, DROPPED = "kept", "dropped"

# Histogram -> lower ends of its bins; the last bin has no upper end.
BINS: dict[str, tuple[int, ...]] = {
    "complexity": tuple(range(13)),
    "actions": tuple(range(7)),
    "caption_words": tuple(range(0, 37, 2)),
    "image_side": (0, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048),
}
TITLES = {
    "complexity": "Complexity of the caption",
    "actions": "Actions in the caption",
    "caption_words": "Words of the caption",
    "image_side": "Shorter side of the image, px",
}
NAMES = ("actions", "objects")

# Names that a shard, or a report, hands on.
_MAX_NAMES = 1000
# Names that are held while shards are merged, so that memory does not grow with their number.
_MAX_MERGED = 20_000

_Counters = dict[str, dict[str, collections.Counter]]


def _counters(names: tuple[str, ...]) -> _Counters:
    return {name: {KEPT: collections.Counter(), DROPPED: collections.Counter()} for name in names}


@dataclasses.dataclass
class Measures:
    """Of one shard, or of many merged.

    Attributes:
        histograms: name of `BINS` -> "kept" or "dropped" -> lower end of the bin -> pairs. A pair
            counts where it was measured: a caption that a gate refused has no complexity, an image
            that nobody opened has no size.
        names: "actions" or "objects" -> "kept" or "dropped" -> name -> pairs that have it. Only
            the most frequent are handed on, so that a count may be too low.
        missed: "actions" or "objects" -> "kept" or "dropped" -> by how many pairs at most the count
            of any name is too low; 0 where all counts are exact.
        labels: outcome, as in `Funnel` -> label -> pairs, where the config names a label.
    """

    histograms: _Counters = dataclasses.field(default_factory=lambda: _counters(tuple(BINS)))
    names: _Counters = dataclasses.field(default_factory=lambda: _counters(NAMES))
    missed: _Counters = dataclasses.field(
        default_factory=lambda: {kind: collections.Counter({KEPT: 0, DROPPED: 0}) for kind in NAMES}
    )
    labels: dict[str, collections.Counter] = dataclasses.field(default_factory=dict)

    def add_caption(self, outcome: str, caption: str, graph: CaptionGraph | None) -> None:
        """Counts a pair by its first caption.

        Args:
            outcome: "kept" or "dropped".
            caption: its first one.
            graph: of that caption, where it was parsed.
        """
        self._measure("caption_words", outcome, len(caption.split()))
        if graph is None or graph.drop_reason is not None:
            return
        self._measure("complexity", outcome, graph.complexity)
        self._measure("actions", outcome, len(graph.actions))
        self.names["actions"][outcome].update({edge.predicate for edge in graph.actions})
        self.names["objects"][outcome].update(graph.objects.keys())

    def add_image(self, outcome: str, width: int, height: int) -> None:
        """Counts a pair by the size of its image."""
        self._measure("image_side", outcome, min(width, height))

    def add_label(self, outcome: str, label: Any) -> None:
        """Counts a pair by outcome and label."""
        self.labels.setdefault(outcome, collections.Counter())[str(label)] += 1

    def merge(self, other: Measures) -> None:
        """Adds those of another shard; the result depends on their order only where names do.

        Of more names than are held the rarest are let go, and `missed` grows by the largest count
        among them: no count can be too low by more.
        """
        for mine, theirs in ((self.histograms, other.histograms), (self.names, other.names)):
            for name, outcome in itertools.product(mine, (KEPT, DROPPED)):
                mine[name][outcome].update(theirs[name][outcome])
        for kind, outcome in itertools.product(NAMES, (KEPT, DROPPED)):
            self.missed[kind][outcome] += other.missed[kind][outcome]
            if len(self.names[kind][outcome]) > _MAX_MERGED:
                kept, rarer = self._cut(kind, outcome, _MAX_MERGED // 2)
                self.names[kind][outcome] = collections.Counter(kept)
                self.missed[kind][outcome] += rarer
        for outcome, counts in other.labels.items():
            self.labels.setdefault(outcome, collections.Counter()).update(counts)

    def most_common(self, kind: str, outcome: str, count: int) -> list[tuple[str, int]]:
        """The most frequent names, those of equal frequency in alphabetical order."""
        found = self.names[kind][outcome].items()
        return heapq.nsmallest(count, found, key=lambda item: (-item[1], item[0]))

    def to_json(self, *, with_all_names: bool = False) -> dict[str, Any]:
        """A JSON-able dict, the same for the same pairs in whatever order.

        Args:
            with_all_names: not only the most frequent; for what is merged on.
        """
        count = _MAX_MERGED if with_all_names else _MAX_NAMES
        cuts = {
            kind: {outcome: self._cut(kind, outcome, count) for outcome in outcomes}
            for kind, outcomes in self.names.items()
        }
        return {
            "histograms": {
                name: {
                    outcome: {str(start): bins[start] for start in sorted(bins)}
                    for outcome, bins in outcomes.items()
                }
                for name, outcomes in self.histograms.items()
            },
            "names": {
                kind: {outcome: dict(sorted(kept.items())) for outcome, (kept, _) in found.items()}
                for kind, found in cuts.items()
            },
            "missed": {
                kind: {
                    outcome: self.missed[kind][outcome] + rarer
                    for outcome, (_, rarer) in found.items()
                }
                for kind, found in cuts.items()
            },
            "labels": {key: dict(sorted(found.items())) for key, found in self.labels.items()},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measures:
        """What `to_json` gave."""
        result = cls()
        for name, outcomes in data["histograms"].items():
            for outcome, bins in outcomes.items():
                counts = {int(start): count for start, count in bins.items()}
                result.histograms[name][outcome].update(counts)
        for kind, outcomes in data["names"].items():
            for outcome, counts in outcomes.items():
                result.names[kind][outcome].update(counts)
                result.missed[kind][outcome] = data["missed"][kind][outcome]
        for outcome, counts in data["labels"].items():
            result.labels[outcome] = collections.Counter(counts)
        return result

    def _cut(self, kind: str, outcome: str, count: int) -> tuple[dict[str, int], int]:
        """The most frequent names, and the largest count of those that are not among them."""
        found = self.most_common(kind, outcome, count + 1)
        return dict(found[:count]), found[count][1] if len(found) > count else 0

    def _measure(self, name: str, outcome: str, value: int) -> None:
        start = BINS[name][bisect.bisect_right(BINS[name], value) - 1]
        self.histograms[name][outcome][start] += 1
