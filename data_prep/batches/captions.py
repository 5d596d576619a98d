"""Complexity and action of captions, C and A of CAT (DiHT, arXiv 2301.02280), for batches.

How a caption is parsed belongs in `data_prep.captions`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from data_prep import captions as captions_module
from data_prep.batches.columns import append_columns, read_column
from data_prep.captions.graph import CaptionGraph, cat_reason


class CaptionFilter:
    """Parses captions and decides about each."""

    def __init__(
        self,
        min_complexity: int = 1,
        require_action: bool = True,
        *,
        caption_column: str = "caption",
        graphs: bool = False,
    ):
        """Loads the parser.

        Args:
            min_complexity: least complexity of a caption that is kept; 0 for any.
            require_action: whether a caption that is kept must have an action.
            caption_column: of the tables; text, where null is an empty caption.
            graphs: whether the column `graph` is appended.

        Raises:
            ValueError: spaCy has no English model.
        """
        self._limits: dict[str, Any] = {
            "min_complexity": min_complexity,
            "require_action": require_action,
        }
        self._caption_column = caption_column
        self._has_graphs = graphs
        captions_module.parse_captions([])

    def judge(self, captions: Sequence[str]) -> list[tuple[CaptionGraph, str | None]]:
        """The graph of each caption, and the reason to drop it (None where it is kept)."""
        graphs = captions_module.parse_captions(captions)
        return [(graph, cat_reason(graph, **self._limits)) for graph in graphs]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Appends the decisions.

        Returns:
            The table with `complexity` and `num_actions` (int32), `drop_reason` (string, null where
            the caption is kept, else one of `captions.GATE_REASONS` and `CAT_REASONS`), and `graph`
            (JSON with objects, actions and relations) where that was asked for.
        """
        captions = read_column(table, self._caption_column, "caption_column")
        judged = self.judge([caption or "" for caption in captions])
        columns = {
            "complexity": pa.array([graph.complexity for graph, _ in judged], pa.int32()),
            "num_actions": pa.array([len(graph.actions) for graph, _ in judged], pa.int32()),
            "drop_reason": pa.array([reason for _, reason in judged], pa.string()),
        }
        if self._has_graphs:
            columns["graph"] = pa.array([_to_json(graph) for graph, _ in judged], pa.string())
        return append_columns(table, columns)


def _to_json(graph: CaptionGraph) -> str:
    return json.dumps(
        {
            "objects": {name: list(node.attributes) for name, node in graph.objects.items()},
            "actions": graph.actions,
            "relations": graph.relations,
        },
        ensure_ascii=False,
    )
