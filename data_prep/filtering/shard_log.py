"""All that is recorded while one shard is filtered: counts, measures, samples, lists, time.

It is filled pair by pair, and what it writes is gathered by `reports.summary`. What the filter
decides is not known here. The time goes into a file of its own, so that everything else has
the same bytes in every run.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections

from data_prep.captions.graph import CaptionGraph
from data_prep.captions.mentions import ConceptLog, concept_path, find_mentions
from data_prep.filtering.config import package_versions
from data_prep.filtering.kept import KeptLog, kept_path
from data_prep.filtering.steps.base import Drop
from data_prep.jobs import shards
from data_prep.reports.funnel import KEPT, Funnel
from data_prep.reports.samples import SAMPLES_SUFFIX, SampleLog
from data_prep.reports.statistics import DROPPED, Measures
from data_prep.reports.summary import SECONDS_SUFFIX
from data_prep.text_spotting.spotter import Spot
from diht_jax.data.atomic_file import write_atomically
from diht_jax.data.readers.base import Skipped
from diht_jax.data.records.schema import Pair

DROPPED_SUFFIX = ".dropped.tsv"  # a line for each dropped pair: its key, and "stage/reason"


class ShardLog:
    """The log of one shard.

    Attributes:
        funnel: how many pairs ended how.
        measures: what they look like.
        download: what img2dataset counted, where it did.
        spotter: where text was looked for, of `text_spotting.config.describe_machine`.
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
        self._versions = package_versions(config)
        self._samples = SampleLog(config.report_samples, config.image.max_pixels)
        self._kept = KeptLog()
        self._dropped: list[str] = []
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

    def skip(self, entry: Skipped) -> None:
        """Counts an entry of the source that is no pair."""
        self.funnel.drop("source", entry.reason, entry.key, entry.detail)
        outcome = f"source/{entry.reason}"
        self._list_dropped(entry.key, outcome)
        rank = self.funnel.rank(entry.key, entry.detail)
        if self._samples.wants(outcome, rank):
            self._samples.add(outcome, rank, key=entry.key, caption=entry.detail)

    def drop(
        self,
        stage: str,
        reason: str,
        pair: Pair,
        graph: CaptionGraph | None = None,
        *,
        size: tuple[int, int] | None = None,
        spots: Sequence[Spot] = (),
        match: str | None = None,
        evidence: str | None = None,
    ) -> None:
        """Counts a pair that was not written.

        Args:
            stage: name of the step, or "source".
            reason: as the stage names it.
            pair: as it came.
            graph: of its first caption, where it was parsed.
            size: width and height of its image, where it was opened.
            spots: what was spotted in it.
            match: the spotted text that repeats the caption.
            evidence: for people, what of the pair decided.
        """
        self.funnel.drop(stage, reason, pair.key, pair.caption)
        self._list_dropped(pair.key, f"{stage}/{reason}")
        self._measure(DROPPED, f"{stage}/{reason}", pair, graph, size, spots, match, evidence)

    def drop_candidate(self, step: str, drop: Drop) -> None:
        """Counts what a step of this name has dropped."""
        candidate = drop.candidate
        self.drop(
            drop.stage or step,
            drop.reason,
            candidate.pair,
            candidate.first_graph,
            size=candidate.header[1:] if candidate.header else None,
            spots=candidate.spots,
            match=drop.match,
            evidence=drop.evidence,
        )

    def keep(
        self,
        pair: Pair,
        graphs: Sequence[CaptionGraph],
        image_format: str | None,
        size: tuple[int, int] | None = None,
        spots: Sequence[Spot] = (),
    ) -> None:
        """Counts a pair that was written.

        Args:
            pair: as it was written.
            graphs: of its captions, where they were parsed.
            image_format: of its image, where there is one.
            size: width and height of the image.
            spots: what was spotted in it.
        """
        self.funnel.keep(pair.key, pair.caption, image_format)
        self._kept.add(pair.key, pair.metadata.get("uid"), image_format)
        if self._concepts is not None:
            self._concepts.add(find_mentions(graphs))
        self._measure(KEPT, KEPT, pair, graphs[0] if graphs else None, size, spots, None)

    def write(self, output: pathlib.Path) -> dict[str, Any]:
        """Writes the files beside the output.

        Args:
            output: its path.

        Returns:
            The counts for the statistics; the same in every run.
        """
        counts = self.funnel.to_json() | {"measures": self.measures.to_json()}
        counts["download"] = self.download
        counts["spotter"] = self.spotter
        counts["versions"] = self._versions
        self._kept.write(kept_path(output))
        write_atomically(pathlib.Path(f"{output}{DROPPED_SUFFIX}"), "".join(self._dropped).encode())
        self._samples.write(pathlib.Path(f"{output}{SAMPLES_SUFFIX}"))
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
        shards.write_json(pathlib.Path(f"{output}{SECONDS_SUFFIX}"), seconds)
        return counts

    def _list_dropped(self, key: str, outcome: str) -> None:
        # A tab or a line break in a key would make it two.
        self._dropped.append(f"{' '.join(key.split())}\t{outcome}\n")

    def _measure(
        self,
        side: str,
        outcome: str,
        pair: Pair,
        graph: CaptionGraph | None,
        size: tuple[int, int] | None,
        spots: Sequence[Spot],
        match: str | None,
        evidence: str | None = None,
    ) -> None:
        self.measures.add_caption(side, pair.caption, graph)
        if size is not None:
            self.measures.add_image(side, *size)
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
                spots=spots,
                match=match,
                evidence=evidence,
            )
