"""All that is recorded while one shard is filtered: its decisions, samples, concepts and times.

The time goes into a file of its own, so that everything else has the same bytes in every run.
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

from data_prep.captions.mentions import ConceptLog, concept_path, find_mentions
from data_prep.decisions import samples
from data_prep.decisions.table import KEPT, SOURCE, DecisionWriter, decisions_path, pack_uid
from data_prep.steps import registry
from data_prep.steps.base import Candidate
from diht_jax.readers.base import Skipped
from diht_jax.storage import files

SECONDS_SUFFIX = ".seconds.json"


class ShardLog:
    """The log of one shard."""

    def __init__(self, config: ml_collections.ConfigDict, pictures: int | None = None):
        """Begins an empty log.

        Args:
            config: of `filtering.config.default_config`.
            pictures: samples with pictures; None for as many as the config asks for.
        """
        pictures = config.report_samples if pictures is None else pictures
        self._samples = samples.SampleLog(
            config.samples_per_outcome, pictures, config.seed, config.image.max_pixels
        )
        scores = [name for step in registry.active_steps(config) for name in step.scores]
        self._decisions = DecisionWriter(scores)
        self._concepts = ConceptLog() if config.concepts else None
        self._label_field = config.label_field
        self._formats: collections.Counter[str] = collections.Counter()
        self._read = self._kept = 0
        self._cpu_secs: collections.Counter[str] = collections.Counter()
        self._start = time.perf_counter(), time.process_time()

    @property
    def kept(self) -> int:
        """Pairs that were kept."""
        return self._kept

    @contextlib.contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Adds the processor time of a block to that of its stage."""
        start_secs = time.process_time()
        try:
            yield
        finally:
            self._cpu_secs[stage] += time.process_time() - start_secs

    def skip(self, entry: Skipped, row: int) -> None:
        """Records an entry of the source that is no pair."""
        self._read += 1
        self._decisions.add(
            row,
            {"key": _clean(entry.key), "outcome": SOURCE, "reason": entry.reason, "captions": 0},
        )
        self._samples.add(f"{SOURCE}/{entry.reason}", samples.Sample(entry.key, entry.detail))

    def drop(
        self, candidate: Candidate, stage: str, reason: str, evidence: str | None = None
    ) -> None:
        """Records a pair that was dropped."""
        pair = candidate.pair
        self._add(candidate, {"outcome": stage, "reason": reason, "format": None})
        sample = samples.Sample(
            pair.key,
            pair.caption,
            pair.image,
            candidate.first_graph,
            candidate.spots,
            candidate.values.get("match"),
            evidence,
        )
        self._samples.add(f"{stage}/{reason}", sample)

    def keep(self, candidate: Candidate, image_format: str | None = None) -> None:
        """Records a pair that was kept; its image is written in this format."""
        pair = candidate.pair
        self._kept += 1
        if image_format is not None:
            self._formats[image_format] += 1
        self._add(candidate, {"outcome": KEPT, "format": image_format})
        if self._concepts is not None:
            self._concepts.add(find_mentions(candidate.graphs))
        graph = candidate.graphs[0] if candidate.graphs else None
        text = candidate.captions[0]
        self._samples.add(KEPT, samples.Sample(pair.key, text, pair.image, graph, candidate.spots))

    def write(self, output: str) -> dict[str, Any]:
        """Writes the files next to the output.

        Args:
            output: its path or URL.

        Returns:
            The counts for the statistics; the same in every run.
        """
        counts: dict[str, Any] = {
            "read": self._read,
            "kept": self._kept,
            "image_formats": dict(sorted(self._formats.items())),
        }
        self._decisions.write(decisions_path(output))
        self._samples.write(output + samples.SUFFIX)
        if self._concepts is not None:
            self._concepts.write(concept_path(output))
            counts["concepts"] = self._concepts.counts()
        wall_secs, cpu_secs = self._start
        seconds = {
            "worker": f"{platform.node()}:{os.getpid()}",
            "pairs": self._read,
            "kept": self._kept,
            "wall_secs": round(time.perf_counter() - wall_secs, 4),
            "cpu_secs": round(time.process_time() - cpu_secs, 4),
            "cpu_secs_of_stages": {k: round(v, 4) for k, v in sorted(self._cpu_secs.items())},
        }
        files.write_object(output + SECONDS_SUFFIX, seconds)
        return counts

    def _add(self, candidate: Candidate, decided: dict[str, Any]) -> None:
        self._read += 1
        pair, values = candidate.pair, candidate.values
        row = values | {
            "key": _clean(pair.key),
            "uid": pack_uid(pair.metadata.get("uid")),
            "words": len(pair.caption.split()),
            **decided,
        }
        if self._label_field is not None:
            row["label"] = _clean(str(pair.metadata.get(self._label_field)))
        for name in ("object_names", "action_names"):
            if row.get(name):
                row[name] = [_clean(text) for text in row[name]]
        if row.get("match") is not None:
            row["match"] = _clean(row["match"])
        self._decisions.add(candidate.row, row)


def _clean(text: str) -> str:
    """Text without lone surrogates, which no file takes."""
    return text.encode("utf-8", "replace").decode()
