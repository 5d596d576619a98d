"""What is known of a filter job, or of several: the contents of `report.json`.

It is gathered from what lies beside the parts of a job. Everything in it can be merged: counts add
up, samples are those of the lowest random rank. How the page looks belongs in `page`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.jobs import shards
from data_prep.reports.funnel import KEPT, SOURCE, Funnel, spell_outcome
from data_prep.reports.samples import SAMPLES_SUFFIX, choose_samples, read_samples
from data_prep.reports.statistics import Measures
from data_prep.sources.img2dataset import merge_download_stats
from data_prep.steps.registry import ordered_steps
from data_prep.text_spotting.config import name_machine, warn_of_machines
from diht_jax.storage import files

REPORT = "report.json"
SECONDS_SUFFIX = ".seconds.json"

_VERSION = 2
_MAX_DAMAGED = 100
_PRINTED_CHARS = 80  # of a caption


@dataclasses.dataclass
class FilterReport:
    """What is known of one job, or of several.

    Attributes:
        jobs: of every job its "input", "settings", "config_hash" and number of "shards".
        funnel: counts, and examples as text.
        measures: histograms, frequent names and labels.
        download: what img2dataset counted; empty where it was not at work.
        spotters: where text was looked for, of `text_spotting.config.name_machine` -> shards.
        versions: of packages that took part, name -> version -> shards; nothing of shards that were
            filtered before versions were recorded.
        seconds: "pairs", "wall_secs", "cpu_secs" of all workers, and "stage/NAME" of each stage.
        samples: of `samples.choose_samples`.
        samples_per_outcome: at most so many of them.
        clean_label: the value of good pairs, where the config names a `label_field`.
        num_damaged: archives of which only the pairs before the damage are here.
        damaged: what is wrong with the first of them.
    """

    jobs: list[dict[str, Any]]
    funnel: Funnel
    measures: Measures = dataclasses.field(default_factory=Measures)
    download: dict[str, Any] = dataclasses.field(default_factory=dict)
    spotters: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    seconds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples_per_outcome: int = 0
    clean_label: str = "clean"
    versions: dict[str, collections.Counter[str]] = dataclasses.field(default_factory=dict)
    num_damaged: int = 0
    damaged: list[str] = dataclasses.field(default_factory=list)

    def add_part(self, output: str) -> None:
        """Adds what lies beside one filtered part.

        Args:
            output: its path.
        """
        self.add_counts(shards.read_json(output + shards.STATS_SUFFIX)["counts"])
        with contextlib.suppress(FileNotFoundError):
            self.add_seconds(shards.read_json(output + SECONDS_SUFFIX))
        if self.samples_per_outcome:
            samples = [*self.samples, *read_samples(output + SAMPLES_SUFFIX)]
            self.samples = choose_samples(samples, self.samples_per_outcome)

    def add_counts(self, counts: Mapping[str, Any]) -> None:
        """Adds the counts of one part, as `ShardLog` gave them."""
        per_outcome, seed = self.funnel.samples_per_outcome, self.funnel.seed
        self.funnel.merge(Funnel.from_json(counts, per_outcome, seed))
        self.measures.merge(Measures.from_json(counts["measures"]))
        merge_download_stats(self.download, counts["download"])
        if counts["spotter"] is not None:
            self.spotters[name_machine(counts["spotter"])] += 1
        for name, version in counts.get("versions", {}).items():
            self.versions.setdefault(name, collections.Counter())[version] += 1
        self._add_damaged([counts["damaged"]] if "damaged" in counts else [])

    def add_seconds(self, seconds: Mapping[str, Any]) -> None:
        """Adds the time of one shard, as `ShardLog` wrote it."""
        for name in ("pairs", "wall_secs", "cpu_secs"):
            self.seconds[name] += seconds[name]
        for stage, value in seconds["cpu_secs_of_stages"].items():
            self.seconds[f"stage/{stage}"] += value

    def merge(self, other: FilterReport) -> None:
        """Adds another job."""
        self.jobs += other.jobs
        self.funnel.merge(other.funnel)
        self.measures.merge(other.measures)
        if other.download:
            merge_download_stats(self.download, other.download)
        self.spotters.update(other.spotters)
        for name, found in other.versions.items():
            self.versions.setdefault(name, collections.Counter()).update(found)
        self.seconds.update(other.seconds)
        self._add_damaged(other.damaged, other.num_damaged)
        self.samples = choose_samples(
            [*self.samples, *other.samples], max(self.samples_per_outcome, 1)
        )

    def _add_damaged(self, texts: Sequence[str], count: int | None = None) -> None:
        self.num_damaged += len(texts) if count is None else count
        self.damaged = [*self.damaged, *texts][:_MAX_DAMAGED]

    def samples_by_outcome(self) -> list[tuple[str, list[dict[str, Any]]]]:
        """The samples of each outcome: what was kept first, then the order of the funnel."""
        found: dict[str, list[dict[str, Any]]] = {}
        for sample in self.samples:
            found.setdefault(sample["outcome"], []).append(sample)
        order = [KEPT, *(f"{stage}/{reason}" for stage, reason, _ in self.funnel.rows())]
        return [(name, found[name]) for name in dict.fromkeys(order) if name in found]

    def format_samples(self, per_outcome: int) -> str:
        """So many pairs of each outcome for a terminal, a line each: outcome and caption."""
        return "\n".join(
            f"{spell_outcome(outcome):36} {sample['caption'][:_PRINTED_CHARS]}"
            for outcome, samples in self.samples_by_outcome()
            for sample in samples[:per_outcome]
        )

    def to_json(self, *, with_all_names: bool = False) -> dict[str, Any]:
        """All of it, with the funnel as rows of counts and shares for people.

        Args:
            with_all_names: see `Measures.to_json`.
        """
        return {
            "version": _VERSION,
            "jobs": self.jobs,
            "funnel": [
                {"stage": stage, "reason": reason, "pairs": pairs, "share": self.share(pairs)}
                for stage, reason, pairs in self.funnel.rows()
            ],
            "throughput": self.throughput(),
            "counts": self.funnel.to_json(),
            "measures": self.measures.to_json(with_all_names=with_all_names),
            "download": self.download,
            "spotters": dict(sorted(self.spotters.items())),
            "versions": self.versions_json(),
            "failed": self.failed(),
            "warnings": self.warnings(),
            "num_damaged": self.num_damaged,
            "damaged": self.damaged,
            "seconds": {k: round(v, 4) for k, v in sorted(self.seconds.items())},
            "samples": self.samples,
            "samples_per_outcome": self.samples_per_outcome,
            "texts_per_outcome": self.funnel.samples_per_outcome,
            "clean_label": self.clean_label,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FilterReport:
        """What `to_json` gave."""
        return cls(
            list(data["jobs"]),
            Funnel.from_json(data["counts"], data["texts_per_outcome"], 0),
            Measures.from_json(data["measures"]),
            dict(data["download"]),
            collections.Counter(data["spotters"]),
            collections.Counter(data["seconds"]),
            list(data["samples"]),
            data["samples_per_outcome"],
            data["clean_label"],
            {k: collections.Counter(found) for k, found in data.get("versions", {}).items()},
            data.get("num_damaged", 0),
            list(data.get("damaged", ())),
        )

    def versions_json(self) -> dict[str, dict[str, int]]:
        """Package -> version -> shards, JSON-able."""
        return {k: dict(sorted(found.items())) for k, found in sorted(self.versions.items())}

    def warnings(self) -> list[str]:
        """What a person should know before the pairs are used."""
        found = [
            f"shards were made with unlike versions of {name}: "
            + ", ".join(f"{version} ({count:,} shards)" for version, count in of_version.items())
            for name, of_version in self.versions_json().items()
            if len(of_version) > 1
        ]
        if self.damaged:
            found.append(
                f"{self.num_damaged:,} archives are damaged, and only the pairs before the damage "
                f"are here, such as those of {self.damaged[0]}"
            )
        if failed := self.failed():
            found.append(
                f"{len(failed):,} input shards failed, and nothing of them is here, such as "
                f"{failed[0]['source']}: {failed[0]['error']}"
            )
        return [*filter(None, [warn_of_machines(self.spotters)]), *found]

    def failed(self) -> list[dict[str, str]]:
        """The input shards that failed and are not in here: "source" and "error" of each."""
        return [failed for job in self.jobs for failed in job.get("failed", ())]

    def share(self, pairs: int) -> float:
        """Of all pairs that came in."""
        return pairs / self.funnel.read if self.funnel.read else 0.0

    def throughput(self) -> dict[str, float]:
        """Pairs per second of processor time, in all and by stage; stages count what they did."""
        found = {}
        for name, secs in sorted(self.seconds.items()):
            is_stage = name.startswith("stage/") and name != "stage/loading"  # once in a process
            if name == "cpu_secs" or is_stage:
                pairs = self._pairs_of(name.removeprefix("stage/"))
                if secs > 0 and pairs:
                    found[name.removeprefix("stage/")] = round(pairs / secs, 2)
        return found

    def _pairs_of(self, stage: str) -> int:
        """Pairs that came to a stage."""
        arrived = self.funnel.read - self.funnel.dropped[SOURCE].total()
        for step in ordered_steps():
            if stage == (step.timer or step.name):
                return arrived
            arrived -= self.funnel.dropped.get(step.name, collections.Counter()).total()
        return self.funnel.kept if stage == "writing" else self.funnel.read


def read_report(folder: str | os.PathLike[str]) -> FilterReport:
    """Reads `report.json` of a folder.

    Raises:
        ValueError: there is none, or another version's.
    """
    path = files.join(os.fspath(folder), REPORT)
    try:
        data = shards.read_json(path)
        if data["version"] != _VERSION:
            raise ValueError(f"version {data['version']}")
        return FilterReport.from_json(data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no report of `python -m data_prep.filter` ({type(error).__name__}: {error}); "
            "run that command on the folder's input once more"
        ) from error


def merge_reports(folders: Sequence[str]) -> FilterReport:
    """Reads the reports of several folders as one."""
    report, *others = map(read_report, folders)
    for other in others:
        report.merge(other)
    return report
