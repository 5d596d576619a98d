"""Captions to graphs: the caption part of CAT filtering (DiHT, arXiv 2301.02280).

`parse_captions` turns captions into graphs, and `cat_reason` decides whether to keep a caption.
Neither touches images or files.
"""

from typing import Any

from data_prep.captions.graph import (
    CAT_REASONS,
    GATE_REASONS,
    RULES_VERSION,
    CaptionGraph,
    Edge,
    ObjectNode,
    cat_reason,
    format_graph,
    package_versions,
)

__all__ = [
    "CAT_REASONS",
    "GATE_REASONS",
    "RULES_VERSION",
    "CaptionGraph",
    "Edge",
    "ObjectNode",
    "cat_reason",
    "format_graph",
    "load_parser",
    "package_versions",
    "parse_captions",
]


def __getattr__(name: str) -> Any:
    # Lazy: code that only reads graphs should not pay for importing spaCy.
    if name in ("load_parser", "parse_captions"):
        from data_prep.captions import parse

        return getattr(parse, name)
    raise AttributeError(f"module 'data_prep.captions' has no attribute '{name}'")
