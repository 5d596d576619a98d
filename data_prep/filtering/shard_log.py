"""All that is recorded while one shard is filtered: counts, measures, samples, lists, time.

It is filled pair by pair, and what it writes is gathered by `reports.summary`. What the filter
decides is not known here. The time goes into a file of its own, so that everything else has
the same bytes in every run.
"""

from __future__ import annotations

import collections
import contextlib
import os
import platform
import time
from collections.abc import Iterator
from typing import Any

import ml_collections

from data_prep.captions.graph import CaptionGraph
from data_prep.captions.mentions import ConceptLog, concept_path, find_mentions
from data_prep.filtering.config import package_versions
from data_prep.filtering.decisions import DecisionLog, decisions_path, pack_uid
from data_prep.jobs import shards
from data_prep.reports.funnel import KEPT, Funnel
from data_prep.reports.samples import SAMPLES_SUFFIX, SampleLog
from data_prep.reports.statistics import DROPPED, Measures
from data_prep.reports.summary import SECONDS_SUFFIX
from data_prep.steps import registry
from data_prep.steps.base import Candidate, Drop
from diht_jax.readers.base import Skipped
from diht_jax.records.captions import all_captions
from diht_jax.records.schema import Pair

_MOST = 255  # of the small numbers of the decisions


class ShardLog:
    """The log of one shard.

    Attributes:
        funnel: how many pairs ended how.
        measures: what they look like.
        download: what img2dataset counted, where it did.
        spotter: where text was looked for, of `text_spotting.config.describe_machine`.
        damaged: of an archive of which only the pairs before its damage are here: what is wrong.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        """Begins an empty log.

        Args:
            config: of `config.default_config`.
        """
        self.funnel = Funnel(config.samples_per_outcome, config.seed)
        self.measures = Measures()
        self.download: dict[str, Any] | None = None
        self.spotter: dict[str, str] | None = None
        self.damaged: str | None = None
        self._versions = package_versions(config)
        self._samples = SampleLog(config.report_samples, config.image.max_pixels)
        scores = [name for step in registry.active_steps(config) for name in step.scores]
        self._decisions = DecisionLog(scores)
        self._concepts = ConceptLog() if config.concepts else None
        self._label_field = config.label_field
        self._cpu_secs: collections.Counter[str] = collections.Counter()
        self._start = time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Adds the processor time of a block to that of its stage."""
        start_secs = time.process_time()
        try:
            yield
        finally:
            self._cpu_secs[stage] += time.process_time() - start_secs

    def skip(self, entry: Skipped, row: int | None = None) -> None:
        """Counts an entry of the source that is no pair.

        Args:
            entry: what was found instead.
            row: its number among all entries.
        """
        self.funnel.drop("source", entry.reason, entry.key, entry.detail)
        self._decisions.add(
            row,
            {"key": _clean(entry.key), "outcome": "source", "reason": entry.reason, "captions": 0},
        )
        outcome = f"source/{entry.reason}"
        rank = self.funnel.rank(entry.key, entry.detail)
        if self._samples.wants(outcome, rank):
            self._samples.add(outcome, rank, key=entry.key, caption=entry.detail)

    def drop_candidate(self, step: str, drop: Drop) -> None:
        """Counts a pair that was not written.

        Args:
            step: name of the step that dropped it.
            drop: the pair, with what is known of it.
        """
        stage, candidate = drop.stage or step, drop.candidate
        pair = candidate.pair
        self.funnel.drop(stage, drop.reason, pair.key, pair.caption)
        values = _describe(candidate) | _describe_match(drop)
        if values.get("gate") == drop.reason:
            del values["gate"]
        self._decisions.add(candidate.row, values | {"outcome": stage, "reason": drop.reason})
        self._measure(DROPPED, f"{stage}/{drop.reason}", candidate, drop)

    def keep(
        self, candidate: Candidate, image_format: str | None = None, written: Pair | None = None
    ) -> None:
        """Counts a pair that was written.

        Args:
            candidate: as it came through the steps.
            image_format: of its image, where there is one.
            written: the pair without the captions that were not good; None for the whole.
        """
        pair = candidate.pair if written is None else written
        self.funnel.keep(pair.key, pair.caption, image_format)
        self._decisions.add(
            candidate.row, _describe(candidate) | {"outcome": KEPT, "format": image_format}
        )
        if self._concepts is not None:
            self._concepts.add(find_mentions(candidate.graphs))
        graph = candidate.graphs[0] if candidate.graphs else None
        self._measure(KEPT, KEPT, candidate._replace(pair=pair), graph=graph)

    def write(self, output: str) -> dict[str, Any]:
        """Writes the files beside the output.

        Args:
            output: its path or URL.

        Returns:
            The counts for the statistics; the same in every run.
        """
        counts = self.funnel.to_json() | {"measures": self.measures.to_json()}
        counts["download"] = self.download
        counts["spotter"] = self.spotter
        counts["versions"] = self._versions
        if self.damaged is not None:
            counts["damaged"] = self.damaged
        self._decisions.write(decisions_path(output))
        self._samples.write(output + SAMPLES_SUFFIX)
        if self._concepts is not None:
            self._concepts.write(concept_path(output))
            counts["concepts"] = self._concepts.counts()
        wall_secs, cpu_secs = (
            now - start
            for now, start in zip(
                (time.perf_counter(), time.process_time()), self._start, strict=True
            )
        )
        seconds = {
            "worker": f"{platform.node()}:{os.getpid()}",
            "pairs": self.funnel.read,
            "kept": self.funnel.kept,
            "wall_secs": round(wall_secs, 4),
            "cpu_secs": round(cpu_secs, 4),
            "cpu_secs_of_stages": {k: round(v, 4) for k, v in sorted(self._cpu_secs.items())},
        }
        shards.write_json(output + SECONDS_SUFFIX, seconds)
        return counts

    def _measure(
        self,
        side: str,
        outcome: str,
        candidate: Candidate,
        drop: Drop | None = None,
        graph: CaptionGraph | None = None,
    ) -> None:
        """Measures a pair by its first caption, or by the graph that is given."""
        pair = candidate.pair
        graph = candidate.first_graph if graph is None else graph
        self.measures.add_caption(side, pair.caption, graph)
        if candidate.header is not None:
            self.measures.add_image(side, *candidate.header[1:])
        if self._label_field is not None:
            self.measures.add_label(outcome, pair.metadata.get(self._label_field))
        rank = self.funnel.rank(pair.key, pair.caption)
        if self._samples.wants(outcome, rank):
            self._samples.add(
                outcome,
                rank,
                key=pair.key,
                caption=pair.caption,
                image=pair.image,
                graph=graph,
                spots=candidate.spots,
                match=drop and drop.match,
                evidence=drop and drop.evidence,
            )


def _describe(candidate: Candidate) -> dict[str, Any]:
    """The columns of the decisions that do not depend on what was decided."""
    pair, graphs = candidate.pair, candidate.all_graphs
    values: dict[str, Any] = {
        "key": _clean(pair.key),
        "uid": pack_uid(pair.metadata.get("uid")),
        "captions": min(len(all_captions(pair)), _MOST),
        **candidate.scores,
    }
    if graphs:
        first = graphs[0]
        values["gate"] = first.drop_reason
        if first.drop_reason is None:
            values["complexity"] = min(first.complexity, _MOST)
            values["actions"] = min(len(first.actions), _MOST)
    if len(graphs) > 1:
        parsed = [graph for graph in graphs if graph.drop_reason is None]
        active = [graph for graph in parsed if graph.has_action]
        for name, found in (("best_complexity", parsed), ("best_active_complexity", active)):
            if found:
                values[name] = min(max(graph.complexity for graph in found), _MOST)
    if candidate.header is not None:
        _, values["width"], values["height"] = candidate.header
    if candidate.matches:
        shown = sum(match is not None for match in candidate.matches)
        values["matches"] = min(shown, _MOST)
    return values


def _describe_match(drop: Drop) -> dict[str, Any]:
    if drop.match is None:
        return {}
    confidence = next((s.confidence for s in drop.candidate.spots if s.text == drop.match), None)
    return {
        "match": _clean(drop.match),
        "match_chars": None if drop.match_chars is None else min(drop.match_chars, _MOST),
        "match_confidence": confidence,
    }


def _clean(text: str) -> str:
    """Without lone surrogates, which no file takes."""
    return text.encode("utf-8", "replace").decode()
