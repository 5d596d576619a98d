"""Computes report and funnel of one or several filter jobs from their decisions.

The result is plain data in `report.json`, which `data_prep.reports` renders. Stages and reasons
come from the filter steps, so new steps appear automatically. Unknown names come last.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute as pc

from data_prep.decisions import log
from data_prep.decisions.table import KEPT, SOURCE, decisions_path, read_decisions
from data_prep.jobs import shards
from data_prep.sources import merge_download_stats
from data_prep.steps.registry import ordered_steps
from diht_jax.readers.base import SOURCE_REASONS
from diht_jax.storage import files

REPORT = "report.json"
DROPPED = "dropped"
_SIDES = (KEPT, DROPPED)
_SOURCE_WORDS = {reason: reason.replace("_", " ") for reason in SOURCE_REASONS}

SCORES = {name: words for step in ordered_steps() for name, words in step.scores.items()}
# Histogram -> lower edges of its bins. The last bin has no upper edge; the first bin also counts
# all lower values.
BINS: dict[str, Sequence[float]] = {
    "complexity": tuple(range(13)),
    "actions": tuple(range(7)),
    "caption_words": tuple(range(0, 37, 2)),
    "image_side": (0, 64, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048),
    **{name: starts for step in ordered_steps() for name, starts in step.bins.items()},
}
NAMES = {"actions": "action_names", "objects": "object_names"}  # kind of names -> column
_GROUPED = ("outcome", "reason", "label", "format", "looked")  # columns with few distinct values
# Columns to read, as far as they were recorded.
COLUMNS = (*_GROUPED, "words", "complexity", "actions", "width", "height", *NAMES.values(), *SCORES)

_VERSION = 3
_BLOCK_ROWS, _BLOCK_PARTS = 2**17, 256  # maximum rows and parts to count at a time
_MAX_NAMES = 1000  # names of each kind in the report
_COMPACT_ROWS = 2**18  # rows of name counts to collect before summing
_NAME_WORDS = 4  # captions with fewer words may be names; must be an edge of BINS["caption_words"]
_FEW = 0.05  # share of kept pairs up to which the captions may all be names

Report = dict[str, Any]


def stage_reasons() -> dict[str, Mapping[str, str]]:
    """Returns stage -> reason -> text for people, in the order in which pairs reach them."""
    reasons: dict[str, Mapping[str, str]] = {SOURCE: _SOURCE_WORDS}
    for step in ordered_steps():
        reasons[step.name] = step.reasons
    return reasons


@dataclasses.dataclass
class Funnel:
    """Numbers of pairs by outcome.

    Attributes:
        outcomes: (stage, reason) -> pairs. A dropped pair is counted at the first stage that drops
            it; the stage of kept pairs is "kept".
        text_spotting: how text was searched for -> pairs: "read", "gated" or "no_run". "audited"
            pairs are some of the gated ones, and "missed" pairs some of the audited ones.
        read: number of entries read.
    """

    outcomes: Mapping[tuple[str, str | None], int]
    text_spotting: Mapping[str, int] = dataclasses.field(default_factory=dict)
    read: int = 0

    @property
    def kept(self) -> int:
        """Number of kept pairs."""
        return self.outcomes.get((KEPT, None), 0)

    def dropped(self) -> dict[str, dict[str, int]]:
        """Returns stage -> reason -> dropped pairs, for all stages, in the order pairs reach them.

        Stages and reasons that no current step knows come last.
        """
        found: dict[str, dict[str, int]] = {}
        for stage, reasons in stage_reasons().items():
            found[stage] = {}
            for reason in reasons:
                if (stage, reason) in self.outcomes:
                    found[stage][reason] = self.outcomes[stage, reason]
        for stage, reason in sorted(self.outcomes, key=str):
            if stage != KEPT and reason is not None:
                found.setdefault(stage, {}).setdefault(reason, self.outcomes[stage, reason])
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Returns rows of a table: pairs read, pairs dropped for each reason, pairs kept.

        Each row has "stage", "reason" (or ""), "pairs", and "share" of all pairs read.
        """
        counts = {"read": {"": self.read}} | self.dropped() | {KEPT: {"": self.kept}}
        rows = []
        for stage, found in counts.items():
            for reason, pairs in found.items():
                share = pairs / max(self.read, 1)
                rows.append({"stage": stage, "reason": reason, "pairs": pairs, "share": share})
        return rows


def gather(
    outputs: Sequence[str],
    jobs: Sequence[Mapping[str, Any]],
    *,
    samples_per_outcome: int,
    report_samples: int,
    clean_label: str,
) -> Report:
    """Builds the report from the decisions of parts and the files next to them.

    Args:
        jobs: "input", "settings", "config_hash", "failed" and number of "shards" of each job.
        samples_per_outcome: samples per outcome under "counts", as [rank, key, caption].
        report_samples: samples per outcome with pictures.
    """
    sums, facts = _Sums(), _Facts()

    def read_parts() -> Iterator[bytes]:
        where = outputs[0] if outputs else ""
        for batches, stats, times, content in files.map_many(_read_part, outputs, where):
            sums.add(batches)
            facts.add(stats["counts"], times)
            yield content

    chosen = log.choose_samples(read_parts(), max(samples_per_outcome, report_samples))
    funnel, image_formats, measures = sums.finish()
    scored, texts, samples = {}, {}, []
    for name in SCORES:
        if f"{name}/lowest" in chosen:
            scored[name] = {
                end: chosen.pop(f"{name}/{end}")[:report_samples] for end in log.EXTREMES
            }
    for outcome, found in chosen.items():
        texts[outcome] = [[s["rank"], s["key"], s["caption"]] for s in found[:samples_per_outcome]]
        samples += [{"outcome": outcome} | sample for sample in found[:report_samples]]
    failed = [failed for job in jobs for failed in job.get("failed", ())]
    return {
        "version": _VERSION,
        "jobs": list(jobs),
        "funnel": funnel.rows(),
        "throughput": _throughput(funnel, facts.seconds),
        "counts": {
            "read": funnel.read,
            "kept": funnel.kept,
            "dropped": funnel.dropped(),
            "text_spotting": dict(sorted(funnel.text_spotting.items())),
            "image_formats": image_formats,
            "samples": texts,
        },
        "measures": measures,
        "download": facts.download,
        "versions": dict(sorted(facts.versions.items())),
        "failed": failed,
        "warnings": [
            *facts.warnings(failed),
            *_warn_of_names(funnel, measures["histograms"]["caption_words"]),
        ],
        "seconds": dict(sorted(facts.seconds.items())),
        "samples": samples,
        "scored": scored,
        "samples_per_outcome": samples_per_outcome,
        "report_samples": report_samples,
        "clean_label": clean_label,
    }


@dataclasses.dataclass
class _Sums:
    """Accumulates rows of decisions: outcomes, histograms, names, labels.

    The sums depend neither on the order of the rows nor on their division into tables.
    """

    _waiting: list[pyarrow.Table] = dataclasses.field(default_factory=list)
    _groups: list[pyarrow.Table] = dataclasses.field(default_factory=list)
    # Keys are (name of a histogram or kind of names, side).
    _bins: dict[tuple[str, str], np.ndarray] = dataclasses.field(default_factory=dict)
    _names: dict[tuple[str, str], list[pyarrow.Table]] = dataclasses.field(default_factory=dict)

    def add(self, batches: Sequence[pyarrow.RecordBatch]) -> None:
        """Adds rows with the columns `COLUMNS`. Columns of scores may be missing."""
        if batches:
            self._waiting.append(pyarrow.Table.from_batches(batches))
        if sum(map(len, self._waiting)) >= _BLOCK_ROWS or len(self._waiting) >= _BLOCK_PARTS:
            self._count()

    def finish(self) -> tuple[Funnel, dict[str, int], dict[str, Any]]:
        """Returns the funnel, the number of kept pairs by image format, and the measures, as JSON.

        The measures are:

            histograms: name in `BINS` -> "kept" or "dropped" -> lower edge of a bin -> pairs. Only
                pairs with a measured value count: a caption rejected by a gate has no complexity,
                an image that was not opened has no size, and a step that did not run no score.
            names: "actions" or "objects" -> "kept" or "dropped" -> name -> number of pairs with the
                name in their first caption, for the most frequent names.
            labels: outcome -> label -> pairs, if the config names a label field.
        """
        self._count()
        outcomes, looked = collections.Counter[Any](), collections.Counter[Any]()
        formats = collections.Counter[Any]()
        labels: dict[str, dict[str, int]] = {}
        for row in _sum(self._groups, *_GROUPED).to_pylist() if self._groups else ():
            stage, reason, label, image_format, look, pairs = row.values()
            outcomes[stage, reason] += pairs
            looked[look] += pairs
            formats[image_format] += pairs
            if label is not None:
                of_label = labels.setdefault(f"{stage}/{reason}" if reason else stage, {})
                of_label[label] = of_label.get(label, 0) + pairs
        del formats[None], looked[None]
        looked["audited"] += looked["missed"]
        looked["gated"] += looked["audited"]
        histograms: dict[str, dict[str, dict[str, int]]] = {}
        for name, side in itertools.product(BINS, _SIDES):
            bins = histograms.setdefault(name, {}).setdefault(side, {})
            for start, pairs in zip(BINS[name], self._bins.get((name, side), ()), strict=False):
                if pairs:
                    bins[str(start)] = int(pairs)
        names: dict[str, dict[str, dict[str, int]]] = {}
        for kind, side in itertools.product(NAMES, _SIDES):
            pairs_of = names.setdefault(kind, {}).setdefault(side, {})
            if tables := self._names.get((kind, side)):
                order = [("count", "descending"), ("name", "ascending")]
                rows = _sum(tables, "name").sort_by(order).slice(0, _MAX_NAMES).to_pydict()
                pairs_of.update(zip(*rows.values(), strict=True))
        measures = {"labels": labels, "histograms": histograms, "names": names}
        spotting = +looked  # drops zeros
        return Funnel(outcomes, spotting, outcomes.total()), dict(sorted(formats.items())), measures

    def _count(self) -> None:
        """Counts the waiting rows. A score that a part did not record is null."""
        if not self._waiting:
            return
        all_rows = pyarrow.concat_tables(self._waiting, promote_options="default")
        self._waiting = []
        grouped = all_rows.select(_GROUPED).group_by(list(_GROUPED)).aggregate([([], "count_all")])
        self._groups.append(grouped.rename_columns({"count_all": "count"}))
        is_kept = pc.equal(all_rows["outcome"], KEPT)
        for side, chosen in zip(_SIDES, (is_kept, pc.invert(is_kept)), strict=True):
            rows = all_rows.filter(chosen)
            measured = {
                "complexity": rows["complexity"],
                "actions": rows["actions"],
                "caption_words": rows.filter(pc.not_equal(rows["outcome"], SOURCE))["words"],
                "image_side": pc.min_element_wise(rows["width"], rows["height"]),
            }
            for name in SCORES:
                if name in BINS and name in rows.column_names:
                    measured[name] = rows[name]
            for name, values in measured.items():
                numbers = values.drop_null().to_numpy()
                numbers = numbers[~np.isnan(numbers)]
                places = np.searchsorted(BINS[name], numbers, side="right") - 1
                counts = np.bincount(np.maximum(places, 0), minlength=len(BINS[name]))
                self._bins[name, side] = counts + self._bins.get((name, side), 0)
            for kind, column in NAMES.items():
                found = pc.value_counts(pc.list_flatten(rows[column]))
                names = pyarrow.table({"name": found.field(0), "count": found.field(1)})
                known = self._names.setdefault((kind, side), [])
                known.append(names)
                if sum(map(len, known)) > _COMPACT_ROWS + 2 * len(known[0]):
                    self._names[kind, side] = [_sum(known, "name")]


def _sum(tables: Sequence[pyarrow.Table], *columns: str) -> pyarrow.Table:
    """Sums the column "count" of tables for each combination of the other columns."""
    total = pyarrow.concat_tables(tables).group_by(list(columns)).aggregate([("count", "sum")])
    return total.rename_columns({"count_sum": "count"}).select([*columns, "count"])


@dataclasses.dataclass
class _Facts:
    """Collects facts of parts other than counts: versions, machines, times, downloads, damage."""

    download: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    seconds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    _machines: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    _damaged: str = ""
    _num_damaged: int = 0

    def add(self, stated: Mapping[str, Any], times: Mapping[str, Any]) -> None:
        """Adds the counts from a part's statistics, and its times."""
        if stated.get("download") is not None:
            merge_download_stats(self.download, stated["download"])
        if (spotter := stated.get("spotter")) is not None:
            self._machines[f"{spotter['precision']} on {spotter['device']}"] += 1
        for name, version in stated.get("versions", {}).items():
            self.versions.setdefault(name, collections.Counter())[version] += 1
        if "damaged" in stated:
            self._num_damaged += 1
            self._damaged = self._damaged or stated["damaged"]
        for name in ("pairs", "wall_secs", "cpu_secs"):
            self.seconds[name] = round(self.seconds[name] + times.get(name, 0), 4)
        for stage, secs in times.get("cpu_secs_of_stages", {}).items():
            name = f"stage/{stage}"
            self.seconds[name] = round(self.seconds[name] + secs, 4)

    def warnings(self, failed: Sequence[Mapping[str, str]]) -> Iterator[str]:
        """Yields warnings to read before the pairs are used."""

        def list_counts(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{name} ({n:,} shards)" for name, n in sorted(counts.items()))

        if len(self._machines) > 1:
            yield (
                f"text was read with different rounding, {list_counts(self._machines)}: another "
                "run, on other machines, may decide differently about a few pairs; name "
                "config.spotter.precision and device to avoid it"
            )
        for name, of_version in sorted(self.versions.items()):
            if len(of_version) > 1:
                counts = list_counts(of_version)
                yield f"shards were made with unlike versions of {name}: {counts}"
        if self._num_damaged:
            yield (
                f"{self._num_damaged:,} archives are damaged, and only the pairs before the damage "
                f"are here, such as those of {self._damaged}"
            )
        if failed:
            yield (
                f"{len(failed):,} input shards failed, and nothing of them is here, such as "
                f"{failed[0]['source']}: {failed[0]['error']}"
            )


def _warn_of_names(funnel: Funnel, words: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yields a warning if most captions are names, of which CAT keeps almost nothing."""
    arrived, dropped = funnel.read, 0
    for stage, found in funnel.dropped().items():
        arrived -= dropped
        dropped = sum(found.values())
        if stage == "caption":
            break
    captions = short = 0
    for of_side in words.values():
        for number, pairs in of_side.items():
            captions += pairs
            short += pairs if int(number) < _NAME_WORDS else 0
    least = short - (captions - arrived)  # assumes that all pairs dropped earlier were short
    if funnel.kept <= _FEW * arrived and min(dropped, least) > arrived / 2:
        yield (
            f"{short:,} of {captions:,} captions have fewer than {_NAME_WORDS} words, as "
            "names of classes have, and the rules for captions are made for the sentences of the "
            "web: --config prep/convert is for names, and keeps every pair whose picture can be "
            "read"
        )


def _read_part(output: str) -> tuple[list[pyarrow.RecordBatch], dict, dict, bytes]:
    batches = list(read_decisions(decisions_path(output), list(COLUMNS)))
    path = output + shards.STATS_SUFFIX
    stats = shards.read_json(path)
    if stats.get("output", {}).get("file") != os.path.basename(output):
        raise ValueError(f"{path}: of something else; delete it, and run the filter again")
    seconds = files.read_object(output + log.SECONDS_SUFFIX) or {}
    return batches, stats, seconds, log.read_samples(output + log.SAMPLES_SUFFIX)


def _throughput(funnel: Funnel, seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns pairs per second of CPU time, in total and for the pairs that reach each stage."""
    dropped = funnel.dropped()
    arrived = funnel.read - sum(dropped[SOURCE].values())
    pairs_of = {"writing": funnel.kept}
    for step in ordered_steps():
        pairs_of[step.timer or step.name] = arrived
        arrived -= sum(dropped[step.name].values())
    found = {}
    for name, secs in sorted(seconds.items()):
        stage = name.removeprefix("stage/")
        if name == "cpu_secs" or (stage != name and stage != "loading"):  # done once per process
            pairs = pairs_of.get(stage, funnel.read)
            if secs > 0 and pairs:
                found[stage] = round(pairs / secs, 2)
    return found


def read_report(folder: str | os.PathLike[str]) -> Report:
    """Reads `report.json` of a folder.

    Raises:
        ValueError: there is no report, or one of another version.
    """
    path = files.join(os.fspath(folder), REPORT)
    try:
        report = shards.read_json(path)
        if report["version"] != _VERSION:
            raise ValueError(f"version {report['version']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no report of `python -m data_prep.filter` ({type(error).__name__}: {error}); "
            "run that command on the folder's input once more"
        ) from error
    return report
