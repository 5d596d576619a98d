"""A memo of the caption graphs of one shard: equal texts are parsed once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from data_prep.captions.graph import CaptionGraph

# Some 2 kB each. Of a larger shard the texts that came first are forgotten first.
_MAX_ENTRIES = 100_000


class CaptionMemo:
    """The graphs of the texts of a shard.

    Attributes:
        seen: captions that were asked for.
        parsed: of them, those that were really parsed.
    """

    def __init__(self, max_entries: int = _MAX_ENTRIES):
        self.seen = 0
        self.parsed = 0
        self._max_entries = max_entries
        self._graphs: dict[str, CaptionGraph] = {}

    def parse(self, captions: Sequence[str]) -> list[CaptionGraph]:
        """One graph per caption, in order; like `captions.parse_captions`."""
        from data_prep.captions.parse import parse_captions

        new = list(dict.fromkeys(text for text in captions if text not in self._graphs))
        self._graphs.update(zip(new, parse_captions(new), strict=True))
        graphs = [self._graphs[text] for text in captions]
        self.seen += len(captions)
        self.parsed += len(new)
        excess = max(0, len(self._graphs) - self._max_entries)
        for text in list(itertools.islice(self._graphs, excess)):
            del self._graphs[text]
        return graphs
