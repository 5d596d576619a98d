"""Complexity and action of the captions: C and A of CAT (DiHT, arXiv 2301.02280).

Good captions of a pair are kept. How captions are parsed belongs in `data_prep.captions`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from data_prep import captions
from data_prep.captions import versions
from data_prep.captions.graph import GATE_REASONS, CaptionGraph
from data_prep.steps.base import Candidate, Columns, Step, check_integers
from diht_jax.readers.base import SourceShard

_MOST = 255  # a larger complexity is recorded, and decided about, as this one
_COLUMNS = ("captions", "gate", "complexity", "actions", "best_complexity")
_COLUMNS += ("best_active_complexity", "object_names", "action_names")


class CaptionStep(Step):
    """Parses the captions, and drops pairs without one that passes the gates, C and A."""

    name = "caption"
    order = 10
    reasons = {
        "empty": "no words",
        "file_name": "file name",
        "url": "url",
        "not_english": "not english",
        "complexity": "C: complexity",
        "no_action": "A: no action",
    }
    limits = ("complexity", "min_complexity", "action")
    timer = "captions"

    @classmethod
    def add_defaults(cls, config: ml_collections.ConfigDict) -> None:
        config.complexity = True  # C of CAT: drop captions of a complexity under min_complexity
        config.min_complexity = 1  # attributes and relations of the object that has most
        config.action = True  # A of CAT: drop captions without an action

    @classmethod
    def check(cls, config: ml_collections.ConfigDict) -> None:
        check_integers({"min_complexity": (config.min_complexity, 0)})
        if config.min_complexity > _MOST:
            raise ValueError(
                f"config.min_complexity={config.min_complexity}; expected {_MOST} at most"
            )

    @classmethod
    def is_active(cls, config: ml_collections.ConfigDict) -> bool:
        """True if anything is asked of the captions; else the parser is not even loaded."""
        return _is_wanted(config) or config.metadata_only

    @classmethod
    def describe_rules(cls, config: ml_collections.ConfigDict) -> dict[str, Any]:
        return {"caption_rules": versions.RULES_VERSION} if _is_wanted(config) else {}

    @classmethod
    def package_versions(cls, config: ml_collections.ConfigDict) -> dict[str, str]:
        return versions.package_versions()

    def __init__(self, config: ml_collections.ConfigDict, source: SourceShard):
        super().__init__(config, source)
        captions.parse_captions([])  # loads the parser

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Sequence[Any]]:
        texts = itertools.chain(*(candidate.captions for candidate in batch))
        parsed = iter(captions.parse_captions(list(texts)))
        columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
        for candidate in batch:
            graphs = list(itertools.islice(parsed, len(candidate.captions)))
            candidate.graphs, candidate.first_graph = graphs, graphs[0]
            rows = [_describe(graph) for graph in graphs]
            values = rows[0] | {"captions": min(len(graphs), _MOST)}
            if rows[0]["gate"] is None:
                values["object_names"] = list(graphs[0].objects)
                values["action_names"] = sorted({edge.predicate for edge in graphs[0].actions})
            if len(graphs) > 1:
                candidate.of_captions = {name: [row[name] for row in rows] for name in rows[0]}
                found = [row for row in rows if row["gate"] is None]
                for name in ("best_complexity", "best_active_complexity"):
                    values[name] = max((row["complexity"] for row in found), default=None)
                    found = [row for row in found if row["actions"]]
            for name, column in columns.items():
                column.append(values.get(name))
        return columns

    @classmethod
    def decide(cls, columns: Columns, config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
        if not drops_captions(config):
            return {}
        limits = caption_limits(config)
        complexity, actions = columns.numbers("complexity"), columns.numbers("actions")
        best = np.where(actions > 0, complexity, np.nan) if limits["require_action"] else complexity
        name = "best_active_complexity" if limits["require_action"] else "best_complexity"
        best = np.where(columns.numbers("captions") > 1, columns.numbers(name), best)
        is_bad = ~(best >= limits["min_complexity"])
        is_simple = complexity < limits["min_complexity"]
        reasons = {reason: is_bad & columns.is_text("gate", reason) for reason in GATE_REASONS}
        return reasons | {"complexity": is_bad & is_simple, "no_action": is_bad}


def caption_limits(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """C and A as arguments of `batches.CaptionFilter` and of `captions.graph.cat_reason`."""
    return {
        "min_complexity": config.min_complexity if config.complexity else 0,
        "require_action": config.action,
    }


def drops_captions(config: ml_collections.ConfigDict) -> bool:
    """True if captions are dropped, if only by the gates."""
    return config.complexity or config.action


def compare_captions(
    before: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> tuple[bool, bool]:
    """Tells if fewer, and if more of several captions may pass this step now."""
    old, new = (
        tuple(caption_limits(config).values()) if drops_captions(config) else (-1, False)
        for config in (before, now)
    )
    return (
        any(b > a for a, b in zip(old, new, strict=True)),
        any(b < a for a, b in zip(old, new, strict=True)),
    )


def _is_wanted(config: ml_collections.ConfigDict) -> bool:
    return drops_captions(config) or config.concepts


def _describe(graph: CaptionGraph) -> dict[str, Any]:
    """The columns of one caption."""
    if graph.drop_reason is not None:
        return {"captions": 1, "gate": graph.drop_reason, "complexity": None, "actions": None}
    complexity, actions = min(graph.complexity, _MOST), min(len(graph.actions), _MOST)
    return {"captions": 1, "gate": None, "complexity": complexity, "actions": actions}
